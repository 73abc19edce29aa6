//! Changing places of an XML text and no other byte of it.

use std::ops::Range;

use roxmltree::{Attribute, Node};

/// A place, and what is to stand there.
pub(super) type Edit = (Range<usize>, String);

/// `text` with each of these places, which do not overlap, replaced.
pub(super) fn spliced(text: &str, mut edits: Vec<Edit>) -> String {
    edits.sort_by_key(|(range, _)| range.start);
    let mut result = String::with_capacity(text.len() + edits.iter().map(|(_, new)| new.len()).sum::<usize>());
    let mut done = 0;
    for (range, new) in edits {
        result.push_str(&text[done..range.start]);
        result.push_str(&new);
        done = range.end;
    }
    result.push_str(&text[done..]);
    result
}

/// A place together with the white space that leads to it.
pub(super) fn with_space_before(xml: &str, range: Range<usize>) -> Range<usize> {
    xml[..range.start].trim_end_matches(is_space).len()..range.end
}

/// Whether XML takes a character for white space.
pub(super) fn is_space(character: char) -> bool {
    matches!(character, ' ' | '\t' | '\r' | '\n')
}

/// The longest indentation that is imitated.
const LONGEST_INDENTATION: usize = 100;

/// The line break and the indentation that `space`, which is white space, ends with; nothing if it has no line
/// break.
fn indentation(space: &str) -> &str {
    let Some(newline) = space.rfind('\n') else { return "" };
    let line = if space[..newline].ends_with('\r') { newline - 1 } else { newline };
    if space.len() - line > LONGEST_INDENTATION { "" } else { &space[line..] }
}

/// The indentation of what begins at `start`.
pub(super) fn indentation_before(xml: &str, start: usize) -> &str {
    indentation(&xml[with_space_before(xml, start..start)])
}

/// The indentation of what follows on `end`.
pub(super) fn indentation_after(xml: &str, end: usize) -> &str {
    let rest = &xml[end..];
    indentation(&rest[..rest.len() - rest.trim_start_matches(is_space).len()])
}

/// `indentation`, one level further in.
pub(super) fn deeper(indentation: &str) -> String {
    if indentation.is_empty() { String::new() } else { format!("{indentation}  ") }
}

/// Where the name in an element's start tag ends.
pub(super) fn name_end(element: &Node<'_, '_>) -> usize {
    // Only elements without a prefix are changed.
    element.range().start + 1 + element.tag_name().name().len()
}

/// Where an element's start tag ends, or its only tag.
pub(super) fn start_tag_end(xml: &str, element: &Node<'_, '_>) -> usize {
    let start = name_end(element);
    let mut quote = None;
    for (at, byte) in xml[start..element.range().end].bytes().enumerate() {
        match (quote, byte) {
            (None, b'>') => return start + at + 1,
            (None, b'"' | b'\'') => quote = Some(byte),
            (Some(open), byte) if open == byte => quote = None,
            _ => {}
        }
    }
    element.range().end
}

/// The place of an attribute's name, which has no prefix.
pub(super) fn name_range(attribute: &Attribute<'_, '_>) -> Range<usize> {
    let start = attribute.range().start;
    start..start + attribute.name().len()
}

/// The place between an attribute's quotes. roxmltree's own answer is wrong where more than 255 bytes of
/// white space stand around the equals sign.
pub(super) fn value_range(xml: &str, attribute: &Attribute<'_, '_>) -> Range<usize> {
    let Range { start, end } = attribute.range();
    let quote = xml[start..end].find(['"', '\'']).unwrap_or(0);
    start + quote + 1..end - 1
}

/// An attribute together with the one character that parts it from what is before.
pub(super) fn with_separator(attribute: &Attribute<'_, '_>) -> Range<usize> {
    let Range { start, end } = attribute.range();
    start - 1..end
}

/// Adds `value` to `text`, as an attribute's value in quotes of either kind.
pub(super) fn escape(text: &mut String, value: &str) {
    let mut done = 0;
    for (at, byte) in value.bytes().enumerate() {
        let reference = match byte {
            b'&' => "&amp;",
            b'<' => "&lt;",
            b'>' => "&gt;",
            b'"' => "&quot;",
            b'\'' => "&apos;",
            // These would be read as spaces.
            b'\t' => "&#9;",
            b'\n' => "&#10;",
            b'\r' => "&#13;",
            _ => continue,
        };
        text.push_str(&value[done..at]);
        text.push_str(reference);
        done = at + 1;
    }
    text.push_str(&value[done..]);
}
