//! Giving a domain's definition the wrapper as its emulator, and taking that back.
//!
//! Only the emulator's path is replaced and one element added to the metadata, which keeps the path that
//! stood there before; every other byte stays.

use std::ops::Range;
use std::path::Path;

use roxmltree::{Document, Node};

use super::InvalidXml;
use super::splice::{spliced, with_space_before};
use super::xml::{child, is};
use crate::protocol::EMULATOR_DIRECTORY;

/// The namespace of what volcrypt keeps in a domain's metadata.
pub const METADATA_NAMESPACE: &str = "https://volcrypt.org/xmlns/libvirt/1";
/// The element that says which emulator the domain had.
const NOTE: &str = "adopted";

/// What [`adopt`] came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Adoption {
    /// The definition runs the wrapper from now on.
    Changed {
        /// The new definition.
        xml: String,
        /// The emulator that it named.
        from: String,
        /// The wrapper under that emulator's name.
        to: String,
    },
    /// It runs the wrapper as it is.
    Already,
}

/// What [`release`] came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Release {
    /// The definition is as it was before it was adopted.
    Changed {
        /// The new definition.
        xml: String,
        /// The emulator that it names now, if it names one.
        emulator: Option<String>,
    },
    /// It was not adopted.
    NotAdopted,
}

/// The definition `xml` with the wrapper in the place of its emulator.
///
/// # Errors
/// When `xml` is no domain's, or its emulator is no plain path of a program.
pub fn adopt(xml: &str) -> Result<Adoption, InvalidXml> {
    let document = parse(xml)?;
    let domain = document.root_element();
    let Some(emulator) = Emulator::of(xml, &domain)? else { return Ok(Adoption::Already) };
    if emulator.is_wrapper() {
        return Ok(Adoption::Already);
    }
    let Some(name) = Path::new(emulator.path).file_name() else {
        return Err(InvalidXml(format!("its <emulator> {} is no program", emulator.path)));
    };
    let to = format!("{EMULATOR_DIRECTORY}/{}", name.display());
    let path = emulator.path.replace('"', "&quot;");
    let note = format!(r#"<volcrypt:{NOTE} xmlns:volcrypt="{METADATA_NAMESPACE}" emulator="{path}"/>"#);
    let noted = match (note_in(&domain), child(&domain, "metadata"), child(&domain, "devices")) {
        (Some(old), ..) => (old.range(), note),
        (None, Some(metadata), _) => match metadata.first_child() {
            Some(first) => (first.range().start..first.range().start, format!("\n    {note}")),
            None => (metadata.range(), format!("<metadata>\n    {note}\n  </metadata>")),
        },
        (None, None, devices) => {
            let start = devices.map_or(0, |devices| devices.range().start);
            (start..start, format!("<metadata>\n    {note}\n  </metadata>\n  "))
        }
    };
    let xml = spliced(xml, vec![noted, (emulator.range, to.clone())]);
    Ok(Adoption::Changed { xml, from: emulator.path.to_owned(), to })
}

/// The definition `xml` as it was before [`adopt`]. An emulator that somebody has set since then stays.
///
/// # Errors
/// As for [`adopt`].
pub fn release(xml: &str) -> Result<Release, InvalidXml> {
    let document = parse(xml)?;
    let domain = document.root_element();
    let Some(note) = note_in(&domain) else { return Ok(Release::NotAdopted) };
    let emulator = Emulator::of(xml, &domain)?;
    let before = note.attribute("emulator");
    let metadata = note.parent().filter(|metadata| metadata.children().filter(Node::is_element).count() == 1);
    let mut edits = vec![(with_space_before(xml, metadata.unwrap_or(note).range()), String::new())];
    let mut named = emulator.as_ref().map(|emulator| emulator.path.to_owned());
    if let (Some(emulator), Some(before)) = (emulator.filter(Emulator::is_wrapper), before) {
        edits.push((emulator.range, before.to_owned()));
        named = Some(before.to_owned());
    }
    Ok(Release::Changed { xml: spliced(xml, edits), emulator: named })
}

/// The text of a domain's `<emulator>`.
struct Emulator<'a> {
    path: &'a str,
    range: Range<usize>,
}

impl<'a> Emulator<'a> {
    fn of(xml: &'a str, domain: &Node<'_, '_>) -> Result<Option<Self>, InvalidXml> {
        let Some(element) = child(domain, "devices").and_then(|devices| child(&devices, "emulator")) else {
            return Ok(None);
        };
        let range = element.first_child().map_or(0..0, |text| text.range());
        // Without references and comments, what is read is what stands there, and can be written back.
        match (element.children().count(), element.text(), &xml[range.clone()]) {
            (1, Some(text), raw) if text == raw => Ok(Some(Emulator { path: raw, range })),
            _ => Err(InvalidXml("its <emulator> holds no plain path".to_owned())),
        }
    }

    fn is_wrapper(&self) -> bool {
        Path::new(self.path).parent() == Some(Path::new(EMULATOR_DIRECTORY))
    }
}

fn parse(xml: &str) -> Result<Document<'_>, InvalidXml> {
    let document = Document::parse(xml).map_err(|error| InvalidXml(error.to_string()))?;
    match is(&document.root_element(), "domain") {
        true => Ok(document),
        false => Err(InvalidXml("it is no <domain>".to_owned())),
    }
}

fn note_in<'a, 'input>(domain: &Node<'a, 'input>) -> Option<Node<'a, 'input>> {
    let metadata = child(domain, "metadata")?;
    metadata.children().find(|element| element.has_tag_name((METADATA_NAMESPACE, NOTE)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NAMESPACED: &str = "<metadata>\n    <nova:instance xmlns:nova=\"n\"/>\n  </metadata>\n  ";

    /// As libvirt writes it.
    fn definition(metadata: &str, emulator: &str) -> String {
        format!(
            "<domain type='kvm'>\n  <name>web1</name>\n  {metadata}<os>&amp;</os>\n  <devices>\n    {emulator}\n    \
             <disk type='block'><emulator>/not/this</emulator></disk>\n  </devices>\n</domain>\n"
        )
    }

    fn named(path: &str) -> String {
        format!("<emulator>{path}</emulator>")
    }

    fn adopted(xml: &str) -> String {
        match adopt(xml) {
            Ok(Adoption::Changed { xml, .. }) => xml,
            other => panic!("{other:?}"),
        }
    }

    fn released(xml: &str) -> String {
        match release(xml) {
            Ok(Release::Changed { xml, .. }) => xml,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_the_emulator_and_the_note_change() {
        let note = r#"<volcrypt:adopted xmlns:volcrypt="https://volcrypt.org/xmlns/libvirt/1" emulator="/usr/bin/qemu-system-x86_64"/>"#;
        let wrapper = named("/usr/libexec/volcrypt/emulators/qemu-system-x86_64");
        let plain = named("/usr/bin/qemu-system-x86_64");
        let changed = adopted(&definition(NAMESPACED, &plain));
        let expected = format!("<metadata>\n    {note}\n    <nova:instance xmlns:nova=\"n\"/>\n  </metadata>\n  ");
        assert_eq!(changed, definition(&expected, &wrapper));
        for metadata in ["", "<metadata/>\n  "] {
            let changed = adopted(&definition(metadata, &plain));
            assert!(changed.contains(&format!("<metadata>\n    {note}\n  </metadata>\n  ")), "{changed}");
            assert!(changed.contains(&wrapper) && !changed.contains(&plain), "{changed}");
        }
    }

    #[test]
    fn a_release_restores_every_byte() {
        for metadata in ["", NAMESPACED] {
            for path in ["/usr/bin/qemu-system-x86_64", "/opt/a \"b\"/qemu-system-arm"] {
                let before = definition(metadata, &named(path));
                assert_eq!(released(&adopted(&before)), before);
            }
        }
    }

    #[test]
    fn doing_it_twice_changes_nothing() {
        let changed = adopted(&definition("", &named("/usr/bin/qemu-system-arm")));
        assert_eq!(adopt(&changed), Ok(Adoption::Already));
        assert_eq!(release(&released(&changed)), Ok(Release::NotAdopted));
        assert_eq!(adopt(&definition("", "")), Ok(Adoption::Already));
    }

    #[test]
    fn what_was_set_since_then_stays() {
        let changed = adopted(&definition("", &named("/usr/bin/qemu-system-arm")));
        let edited = changed.replace("/usr/libexec/volcrypt/emulators/", "/opt/");
        assert_eq!(released(&edited), definition("", &named("/opt/qemu-system-arm")));
        // Adopted anew, it keeps the newer one in mind.
        let again = adopted(&edited);
        assert_eq!(again.matches("volcrypt:adopted").count(), 1);
        assert_eq!(released(&again), definition("", &named("/opt/qemu-system-arm")));
    }

    #[test]
    fn only_a_plain_path_in_the_right_place_counts() {
        for emulator in [
            "<emulator/>",
            "<emulator>/a&amp;b</emulator>",
            "<emulator>/a<!-- -->/b</emulator>",
            "<emulator>/usr/bin/..</emulator>",
        ] {
            assert!(adopt(&definition("", emulator)).is_err(), "{emulator}");
        }
        for xml in ["", "<x/>", "<domain", "<d:domain xmlns:d='x'/>"] {
            assert!(adopt(xml).is_err() && release(xml).is_err(), "{xml}");
        }
        // Somebody else's element of the same name.
        let foreign = "<metadata><adopted xmlns=\"x\" emulator=\"/x\"/></metadata>";
        assert_eq!(release(&definition(foreign, &named("/usr/bin/qemu"))), Ok(Release::NotAdopted));
    }

    proptest! {
        #[test]
        fn any_plain_path_comes_back(path in "/[a-z]{1,5}/[ -%'-;=-~é]{1,20}") {
            prop_assume!(!path.contains(['<', '&']) && !path.ends_with('/') && !path.ends_with("/."));
            let before = definition(NAMESPACED, &named(&path));
            if let Ok(Adoption::Changed { xml, .. }) = adopt(&before) {
                prop_assert_eq!(released(&xml), before);
            }
        }
    }
}
