use std::fmt;

use super::Host;

/// The mark on a key that its host is about to destroy in one key manager, because another one has it as well. It is in
/// nobody's way who uses the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaving {
    /// Whose mark it is.
    pub host: Host,
    /// Whether the key manager may have been asked to destroy the key already. Then nobody takes the mark back: what was
    /// asked for may come about yet.
    pub is_asked: bool,
}

/// What stands in a mark before the key manager was asked.
const BEFORE: &str = "leaving";
/// And after.
const ASKED: &str = "asked";

impl Leaving {
    /// What [`Display`](fmt::Display) has written. A mark that somebody else has written is nobody's, and counts all the
    /// same.
    pub fn parse(text: &str) -> Self {
        let mut words = text.splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            (Some(stage @ (BEFORE | ASKED)), Some(id), Some(name)) => {
                Leaving { host: Host { name: name.to_owned(), id: id.to_owned() }, is_asked: stage == ASKED }
            }
            _ => Leaving { host: Host { name: text.to_owned(), id: String::new() }, is_asked: true },
        }
    }

    /// Whether `host` has set it, under the name that it has now: one that was cloned with its id is another.
    pub fn is_of(&self, host: &Host) -> bool {
        !host.id.is_empty() && self.host == *host
    }
}

/// As it is kept beside a key: `leaving ID NAME` or `asked ID NAME`, with the host's id and name.
impl fmt::Display for Leaving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Host { name, id } = &self.host;
        write!(f, "{} {id} {name}", if self.is_asked { ASKED } else { BEFORE })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_comes_back_as_it_was_and_one_of_somebody_elses_is_nobodys() {
        let host = Host { name: "compute 1".to_owned(), id: "5f".to_owned() };
        for is_asked in [false, true] {
            let mark = Leaving { host: host.clone(), is_asked };
            assert_eq!(Leaving::parse(&mark.to_string()), mark);
            assert!(mark.is_of(&host));
            assert!(!mark.is_of(&Host { name: "compute-2".to_owned(), ..host.clone() }), "cloned with its machine-id");
        }
        for text in ["", "yes", "leaving", "leaving 5f", "going 5f compute 1"] {
            let mark = Leaving::parse(text);
            assert!(!mark.is_of(&host) && mark.is_asked, "{text}");
        }
    }
}
