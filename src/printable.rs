//! Names from elsewhere in texts for people.

/// `text` as one line without what could steer a terminal: names of domains, targets and disks come from elsewhere.
pub fn printable(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '?' } else { character }).collect()
}
