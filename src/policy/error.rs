use std::fmt;
use std::ops::Range;

/// Why a configuration is refused: one sentence, `FILE:LINE: what is wrong; what to do`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(String);

impl ConfigError {
    /// A fault of the file as a whole.
    pub(super) fn whole(file: &str, sentence: impl fmt::Display) -> Self {
        ConfigError(format!("{file}: {sentence}"))
    }

    /// A fault at a byte of `text`, the file's content.
    pub(super) fn at(file: &str, text: &[u8], position: usize, sentence: impl fmt::Display) -> Self {
        let before = &text[..position.min(text.len())];
        let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
        ConfigError(format!("{file}:{line}: {sentence}"))
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// A value that is refused, and where it stands in the file.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) span: Range<usize>,
    pub(super) sentence: String,
}

impl Fault {
    pub(super) fn new(span: Range<usize>, sentence: impl Into<String>) -> Self {
        Fault { span, sentence: sentence.into() }
    }
}
