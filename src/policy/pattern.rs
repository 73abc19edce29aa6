use regex::{Captures, Regex, RegexBuilder};
use regex_syntax::hir::literal::Extractor;
use toml::Spanned;

use super::error::Fault;

/// The longest pattern, in bytes.
const PATTERN_LIMIT: usize = 1024;
/// The most memory that a compiled pattern may take, in bytes.
const COMPILED_LIMIT: usize = 1 << 20;

/// A regular expression that a whole text has to match.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    source: String,
    regex: Regex,
}

impl Pattern {
    pub(super) fn new(key: &str, text: &Spanned<String>) -> Result<Self, Fault> {
        let source = text.get_ref().clone();
        if source.is_empty() || source.len() > PATTERN_LIMIT {
            let sentence = format!("{key} has to be a regular expression of 1 to {PATTERN_LIMIT} bytes; correct it");
            return Err(Fault::new(text.span(), sentence));
        }
        // By itself first: `a)|(?:b` is no pattern, yet between the anchors it would be one, and a
        // part of a name would match.
        let compiled = compile(&source).and_then(|_| compile(&format!(r"\A(?:{source})\z")));
        match compiled {
            Ok(regex) => Ok(Pattern { source, regex }),
            Err(what) => {
                let sentence = format!("{key} is no regular expression that can be used: {what}; correct the pattern");
                Err(Fault::new(text.span(), sentence))
            }
        }
    }

    /// The pattern as it stands in the file.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    pub(super) fn is_match(&self, text: &str) -> bool {
        self.regex.is_match(text)
    }

    /// What every text that matches begins with one of; nothing if it may begin with anything.
    pub(super) fn prefixes(&self) -> Option<Vec<Vec<u8>>> {
        let literals = Extractor::new().extract(&regex_syntax::parse(&self.source).ok()?);
        let prefixes: Vec<_> = literals.literals()?.iter().map(|literal| literal.as_bytes().to_vec()).collect();
        prefixes.iter().all(|prefix| !prefix.is_empty()).then_some(prefixes)
    }

    /// What every text that matches begins with.
    pub(super) fn literal_prefix(&self) -> Vec<u8> {
        let mut prefixes = self.prefixes().unwrap_or_default().into_iter();
        let Some(mut common) = prefixes.next() else { return Vec::new() };
        for prefix in prefixes {
            let alike = common.iter().zip(&prefix).take_while(|(one, other)| one == other).count();
            common.truncate(alike);
        }
        common
    }

    pub(super) fn captures_name(&self, name: &str) -> bool {
        self.regex.capture_names().flatten().any(|capture| capture == name)
    }
}

fn compile(pattern: &str) -> Result<Regex, String> {
    let compiled = RegexBuilder::new(pattern).size_limit(COMPILED_LIMIT).dfa_size_limit(COMPILED_LIMIT).build();
    compiled.map_err(|error| match error {
        // The crate draws a picture; its last line says what is wrong.
        regex::Error::Syntax(picture) => {
            let last = picture.lines().last().unwrap_or_default();
            last.trim_start_matches("error: ").to_owned()
        }
        regex::Error::CompiledTooBig(_) => "it is too complicated".to_owned(),
        other => other.to_string().replace('\n', " "),
    })
}

/// What the pattern captures in `text`; nothing if it does not match.
pub(super) fn matched<'a>(pattern: &Pattern, text: &'a str) -> Option<Captures<'a>> {
    pattern.regex.captures(text)
}
