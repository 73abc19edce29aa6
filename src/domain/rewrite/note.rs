//! What is kept in a domain's metadata of the disks that were rewritten.
//!
//! ```xml
//! <volcrypt:disks xmlns:volcrypt="https://volcrypt.org/xmlns/libvirt/disks/1" metadata="absent">
//!   <volcrypt:disk volume="a" dev="/dev/sda"/>
//!   <volcrypt:disk volume="b" file="/srv/b.img" type="file" driver="added"/>
//! </volcrypt:disks>
//! ```
//!
//! `dev` or `file` is the attribute that the disk's source had, and holds what stood between its quotes, references
//! and all. Of a file, `type` is the same of the disk's type, if it had one, and `driver` says what its driver got:
//! the whole element (`added`) or its type (`type-added`). `metadata` says whether the domain had a `<metadata>`
//! (`absent` or `empty`; neither, if it had one with something in it).

use roxmltree::Node;

use super::super::splice::{
    Edit, deeper, escape, indentation_after, indentation_before, is_space, start_tag_end, with_space_before,
};
use super::super::xml::child;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// The namespace of the note. It is one of its own, as that of the owner is.
const NAMESPACE: &str = "https://volcrypt.org/xmlns/libvirt/disks/1";
const NOTE: &str = "disks";
const ENTRY: &str = "disk";
/// How long an entry is without what stood in the source.
const USUAL_ENTRY: usize = 100;

/// The note of a domain.
pub(super) struct Note {
    pub(super) metadata: Metadata,
    pub(super) entries: Vec<Entry>,
}

/// What a domain had for its metadata.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Metadata {
    /// An element with something in it, or at least with two tags.
    Present,
    /// An element of one tag: `<metadata/>`.
    Empty,
    /// None.
    Absent,
}

/// What a disk was.
pub(super) struct Entry {
    /// The volume that it is on.
    pub(super) volume: VolumeId,
    pub(super) before: Before,
}

/// The source of a disk and what went with it, as they stood in the text.
pub(super) enum Before {
    /// `<source dev='…'>`.
    Device(String),
    /// `<source file='…'>`.
    File {
        path: String,
        /// The disk's type; it may have had none.
        kind: Option<String>,
        driver: Driver,
    },
}

/// What the driver of a disk that was a file got.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Driver {
    /// Nothing: it was raw.
    Kept,
    /// Its type.
    TypeAdded,
    /// All of it.
    Added,
}

impl Before {
    /// The name of the attribute that the path stood in.
    pub(super) fn attribute(&self) -> &'static str {
        match self {
            Before::Device(_) => "dev",
            Before::File { .. } => "file",
        }
    }

    pub(super) fn path(&self) -> &str {
        match self {
            Before::Device(path) | Before::File { path, .. } => path,
        }
    }
}

/// The note in a domain's metadata.
///
/// # Errors
/// When there are two.
pub(super) fn find<'a, 'input>(domain: &Node<'a, 'input>) -> Result<Option<Node<'a, 'input>>, Refusal> {
    let Some(metadata) = child(domain, "metadata") else { return Ok(None) };
    let mut notes = metadata.children().filter(|node| node.has_tag_name((NAMESPACE, NOTE)));
    match (notes.next(), notes.next()) {
        (_, Some(_)) => Err(damaged("there are two")),
        (note, None) => Ok(note),
    }
}

/// A note that cannot be what [`super::rewrite`] wrote.
pub(super) fn damaged(why: &str) -> Refusal {
    Refusal::new(
        Reason::Configuration,
        format!(
            "volcrypt's note of the rewritten disks in the domain's metadata is damaged: {why}; write the sources by hand \
             and take the note out"
        ),
    )
}

/// What has to be changed for the note to have `entries` as well.
pub(super) fn with(xml: &str, domain: &Node<'_, '_>, entries: Vec<Entry>) -> Result<Option<Edit>, Refusal> {
    if entries.is_empty() {
        return Ok(None);
    }
    if let Some(element) = find(domain)? {
        let mut note = Note::read(&element)?;
        // What was the disk of the same volume is none any more.
        note.entries.retain(|old| entries.iter().all(|new| new.volume != old.volume));
        note.entries.extend(entries);
        let range = element.range();
        let mut text = String::new();
        note.write(&mut text, indentation_before(xml, range.start));
        return Ok(Some((range, text)));
    }
    let Some(metadata) = child(domain, "metadata") else {
        let start = child(domain, "devices").map_or(0, |devices| devices.range().start);
        let outer = indentation_before(xml, start);
        let text = Note { metadata: Metadata::Absent, entries }.enclosed("<metadata>", outer);
        return Ok(Some((start..start, text + outer)));
    };
    let end = start_tag_end(xml, &metadata);
    Ok(Some(match xml[..end].ends_with("/>") {
        true => {
            let outer = indentation_before(xml, metadata.range().start);
            (end - 2..end, Note { metadata: Metadata::Empty, entries }.enclosed(">", outer))
        }
        false => {
            let indentation = indentation_after(xml, end);
            let mut text = indentation.to_owned();
            Note { metadata: Metadata::Present, entries }.write(&mut text, indentation);
            (end..end, text)
        }
    }))
}

/// What has to be changed for the note to go, and with it the metadata that was made for it.
pub(super) fn without(xml: &str, note: &Node<'_, '_>, before: Metadata) -> Edit {
    let alone = |metadata: &Node<'_, '_>| {
        let blank = |node: Node<'_, '_>| node.is_text() && node.text().is_some_and(|text| text.chars().all(is_space));
        metadata.children().all(|node| node == *note || blank(node))
    };
    let Some(metadata) = note.parent().filter(|metadata| before != Metadata::Present && alone(metadata)) else {
        return (with_space_before(xml, note.range()), String::new());
    };
    let range = metadata.range();
    if before == Metadata::Empty {
        return (start_tag_end(xml, &metadata) - 1..range.end, "/>".to_owned());
    }
    let rest = &xml[range.end..];
    let space = rest.len() - rest.trim_start_matches(is_space).len();
    let next = metadata.parent().and_then(|domain| child(&domain, "devices")).map(|devices| devices.range().start);
    match next == Some(range.end + space) {
        // As it was put there.
        true => (range.start..range.end + space, String::new()),
        false => (with_space_before(xml, range), String::new()),
    }
}

impl Note {
    /// # Errors
    /// When it says too little to go back by.
    pub(super) fn read(element: &Node<'_, '_>) -> Result<Self, Refusal> {
        let metadata = match element.attribute("metadata") {
            None => Metadata::Present,
            Some("empty") => Metadata::Empty,
            Some("absent") => Metadata::Absent,
            Some(_) => return Err(damaged("it does not say what metadata there was")),
        };
        let entries = element.children().filter(|node| node.has_tag_name((NAMESPACE, ENTRY)));
        Ok(Note { metadata, entries: entries.map(|entry| Entry::read(&entry)).collect::<Result<_, _>>()? })
    }

    /// Adds the element, for a place that is indented so.
    fn write(&self, text: &mut String, indentation: &str) {
        let metadata = match self.metadata {
            Metadata::Present => "",
            Metadata::Empty => r#" metadata="empty""#,
            Metadata::Absent => r#" metadata="absent""#,
        };
        let inner = deeper(indentation);
        let length = |entry: &Entry| inner.len() + entry.before.path().len() + USUAL_ENTRY;
        text.reserve(self.entries.iter().map(length).sum());
        *text += &format!(r#"<volcrypt:{NOTE} xmlns:volcrypt="{NAMESPACE}"{metadata}>"#);
        for entry in &self.entries {
            *text += &inner;
            entry.write(text);
        }
        *text += &format!("{indentation}</volcrypt:{NOTE}>");
    }

    /// The element in a new `<metadata>`, of which `start` is the start tag or what is missing of it.
    fn enclosed(&self, start: &str, indentation: &str) -> String {
        let inner = deeper(indentation);
        let mut text = format!("{start}{inner}");
        self.write(&mut text, &inner);
        text + indentation + "</metadata>"
    }
}

impl Entry {
    fn read(element: &Node<'_, '_>) -> Result<Self, Refusal> {
        let volume = element.attribute("volume").unwrap_or_default();
        let volume = volume.parse().map_err(|error| damaged(&format!("{error}")))?;
        let before = match (element.attribute("dev"), element.attribute("file")) {
            (Some(path), None) => Before::Device(path.to_owned()),
            (None, Some(path)) => Before::File {
                path: path.to_owned(),
                kind: element.attribute("type").map(str::to_owned),
                driver: match element.attribute("driver") {
                    None => Driver::Kept,
                    Some("type-added") => Driver::TypeAdded,
                    Some("added") => Driver::Added,
                    Some(_) => return Err(damaged("it does not say what driver there was")),
                },
            },
            _ => return Err(damaged("it does not say what source there was")),
        };
        Ok(Entry { volume, before })
    }

    fn write(&self, text: &mut String) {
        for part in ["<volcrypt:", ENTRY, " volume=\"", self.volume.as_str(), "\" ", self.before.attribute(), "=\""] {
            text.push_str(part);
        }
        escape(text, self.before.path());
        text.push('"');
        if let Before::File { kind, driver, .. } = &self.before {
            if let Some(kind) = kind {
                text.push_str(" type=\"");
                escape(text, kind);
                text.push('"');
            }
            text.push_str(match driver {
                Driver::Kept => "",
                Driver::TypeAdded => r#" driver="type-added""#,
                Driver::Added => r#" driver="added""#,
            });
        }
        text.push_str("/>");
    }
}
