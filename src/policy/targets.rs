use toml::Spanned;

use super::error::Fault;
use super::pattern::Pattern;

/// The places to which QEMU may write what it reads from protected volumes, though nothing encrypts it there.
#[derive(Clone, Debug, Default)]
pub struct PlaintextTargets(Vec<Pattern>);

impl PlaintextTargets {
    pub(super) fn new(patterns: Vec<Spanned<String>>) -> Result<Self, Fault> {
        let pattern = |text: &Spanned<String>| {
            let pattern = Pattern::new("plaintext_targets", text)?;
            match may_be_absolute(&pattern) {
                true => Ok(pattern),
                false => {
                    let sentence = format!(
                        "{:?} matches no absolute path, and plaintext_targets has to match whole ones; write a pattern that \
                         starts with '/'",
                        pattern.source()
                    );
                    Err(Fault::new(text.span(), sentence))
                }
            }
        };
        patterns.iter().map(pattern).collect::<Result<_, _>>().map(PlaintextTargets)
    }

    /// Whether a pattern matches the whole path.
    pub fn allow(&self, path: &str) -> bool {
        self.0.iter().any(|pattern| pattern.is_match(path))
    }

    /// The patterns as they stand in the file.
    pub fn patterns(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(Pattern::source)
    }
}

/// Patterns are what they are written as.
impl PartialEq for PlaintextTargets {
    fn eq(&self, other: &Self) -> bool {
        self.patterns().eq(other.patterns())
    }
}

impl Eq for PlaintextTargets {}

/// Whether some text that starts with a slash could match, as far as literal beginnings tell.
fn may_be_absolute(pattern: &Pattern) -> bool {
    pattern.prefixes().is_none_or(|prefixes| prefixes.iter().any(|prefix| prefix.starts_with(b"/")))
}
