use std::borrow::Cow;

/// A text with named gaps: `vol-${id}.${lun}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Template {
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Literal(String),
    Gap(String),
}

impl Template {
    /// Takes a template apart. The error says what is wrong with it and what to do.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (literal, gap) = rest.split_once("${").map_or((rest, None), |(literal, gap)| (literal, Some(gap)));
            if let Some(wrong) = literal.chars().find(|&letter| !is_id_letter(letter)) {
                return Err(format!(
                    "volume_id holds {wrong:?}, which no volume id may hold; \
                     use letters, digits, '.', '_', '-' and gaps such as ${{id}}"
                ));
            }
            if !literal.is_empty() {
                parts.push(Part::Literal(literal.to_owned()));
            }
            rest = match gap {
                None => "",
                Some(gap) => {
                    let (name, rest) = gap.split_once('}').ok_or("volume_id has a '${' that is not closed; add '}'")?;
                    if !is_capture_name(name) {
                        return Err(format!(
                            "volume_id has a gap called {name:?}; name a capture in letters, digits and '_'"
                        ));
                    }
                    parts.push(Part::Gap(name.to_owned()));
                    rest
                }
            };
        }
        match parts.is_empty() {
            true => Err("volume_id is empty; write a template such as \"${id}\"".to_owned()),
            false => Ok(Template { parts }),
        }
    }

    /// The names of the gaps.
    pub(super) fn gaps(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().filter_map(|part| match part {
            Part::Gap(name) => Some(name.as_str()),
            Part::Literal(_) => None,
        })
    }

    /// The text with every gap filled by what `value` gives for its name; the name of the first gap
    /// that it gives nothing for is the error.
    pub(super) fn fill<'a>(&self, value: impl Fn(&str) -> Option<Cow<'a, str>>) -> Result<String, &str> {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Literal(literal) => text.push_str(literal),
                Part::Gap(name) => text.push_str(&value(name).ok_or(name.as_str())?),
            }
        }
        Ok(text)
    }
}

fn is_id_letter(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || ['.', '_', '-'].contains(&letter)
}

/// Narrower than what the regex crate takes for a name: it is put into messages as it is.
fn is_capture_name(name: &str) -> bool {
    let valid_byte = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    name.bytes().next().is_some_and(|first| !first.is_ascii_digit()) && name.bytes().all(valid_byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn gaps_are_filled_in_order() {
        let template = Template::parse("a-${id}.${lun}").unwrap();
        assert_eq!(template.gaps().collect::<Vec<_>>(), ["id", "lun"]);
        let value = |name: &str| Some(Cow::from(if name == "id" { "x".to_owned() } else { "1".to_owned() }));
        assert_eq!(template.fill(value).as_deref(), Ok("a-x.1"));
        assert_eq!(template.fill(|_| None), Err("id"));
    }

    #[test]
    fn what_can_never_be_an_id_is_refused() {
        for text in ["", "a b", "a/${id}", "$id", "${id", "x$", "é", "${}", "${1}", "${a\nb}"] {
            assert!(Template::parse(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in ".{0,60}") {
            if let Ok(template) = Template::parse(&text) {
                prop_assert_eq!(template.fill(|name| Some(Cow::from(format!("${{{name}}}")))), Ok(text));
            }
        }
    }
}
