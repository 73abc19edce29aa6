use super::super::splice::is_space;
use super::InvalidXml;

/// The encodings that are read as UTF-8 is.
const SAME: [&str; 3] = ["utf-8", "utf8", "us-ascii"];

/// Whether the XML declaration names an encoding by which libvirt, but not we, would read the text: it does not
/// take it for UTF-8 then.
pub(super) fn check_encoding(xml: &str) -> Result<(), InvalidXml> {
    match declared(xml) {
        Some(encoding) if !SAME.contains(&encoding.to_ascii_lowercase().as_str()) => {
            Err(InvalidXml(format!("it says that its encoding is {:?}: write it in UTF-8", encoding)))
        }
        _ => Ok(()),
    }
}

/// The encoding that the XML declaration names: `<?xml version='1.0' encoding='UTF-8'?>`. Whether it is one is
/// for the parser to say.
fn declared(xml: &str) -> Option<&str> {
    let declaration = xml.trim_start_matches('\u{feff}').strip_prefix("<?xml")?;
    let (_, after_version) = quoted(declaration)?;
    let rest = after_version.trim_start_matches(is_space).strip_prefix("encoding")?;
    quoted(rest).map(|(encoding, _)| encoding)
}

/// The first text in quotes, and what follows it.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let start = text.find(['"', '\''])?;
    let quote = text[start..].chars().next()?;
    text[start + 1..].split_once(quote)
}
