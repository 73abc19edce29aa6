//! Domains made at random, together with what they have to become.

use proptest::prelude::*;

use crate::NAMESPACE;

/// A part of a document: as it is, and as it has to be once it is rewritten.
#[derive(Clone, Debug, Default)]
struct Part {
    before: String,
    after: String,
    /// What the note has to hold of it.
    entry: Option<String>,
    volume: Option<String>,
}

impl Part {
    fn same(text: &str) -> Self {
        Part { before: text.to_owned(), after: text.to_owned(), ..Part::default() }
    }

    fn push(&mut self, before: &str, after: &str) {
        self.before.push_str(before);
        self.after.push_str(after);
    }

    fn push_same(&mut self, text: &str) {
        self.push(text, text);
    }
}

/// How somebody writes XML.
#[derive(Clone, Debug)]
struct Hand {
    quote: char,
    equals: &'static str,
    space: &'static str,
    /// Which characters of a path are written as references.
    references: u64,
}

impl Hand {
    fn attribute(&self, name: &str, raw: &str) -> String {
        format!("{name}{}{}{raw}{}", self.equals, self.quote, self.quote)
    }

    /// A path between quotes, as it stands in the text.
    fn path(&self, path: &str) -> String {
        let written = |(at, character): (usize, char)| match (character, self.references >> (at % 64) & 1) {
            ('&', _) => "&amp;".to_owned(),
            ('\'' | '"', _) => format!("&#{};", u32::from(character)),
            (_, 1) => format!("&#x{:x};", u32::from(character)),
            _ => character.to_string(),
        };
        path.chars().enumerate().map(written).collect()
    }

    /// The line break and indentation that `space` ends with.
    fn indentation(&self) -> &'static str {
        self.space.rfind('\n').map_or("", |at| &self.space[at..])
    }
}

fn hands() -> impl Strategy<Value = Hand> {
    (
        prop_oneof![Just('\''), Just('"')],
        prop_oneof![4 => Just("="), 1 => Just(" = "), 1 => Just("\n=\t")],
        prop_oneof![4 => Just("\n      "), 1 => Just(""), 1 => Just(" "), 1 => Just("\n\n\t\t"), 1 => Just("  \n")],
        prop_oneof![3 => Just(0), 1 => any::<u64>()],
    )
        .prop_map(|(quote, equals, space, references)| Hand { quote, equals, space, references })
}

/// What stands between elements and says nothing. It ends in no white space.
fn fillers() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "",
        "",
        "<!-- <source dev='/dev/sda'/> -->",
        "<?source dev='/dev/sda'?>",
        "\n<x>&#38;&lt;<![CDATA[</disk>]]></x>",
        "text<!---->",
    ])
}

/// What a driver says of its format.
#[derive(Clone, Copy, Debug)]
enum Format {
    NoDriver,
    None,
    Raw,
}

/// A disk; `number` makes it another one than the others.
fn disks(number: usize) -> impl Strategy<Value = Part> {
    let protected = (hands(), "[a-z&'\"é ]{0,6}", 0..4_usize, fillers(), fillers());
    let format = prop::sample::select(vec![Format::NoDriver, Format::None, Format::Raw]);
    (protected, any::<bool>(), any::<bool>(), format).prop_map(
        move |((hand, name, kind, filler, inner), has_type, order, format)| match kind {
            0 => foreign(number, filler),
            1 => device(&hand, number, &name, order, (filler, inner)),
            _ => file(&hand, number, &name, has_type, format, (filler, inner)),
        },
    )
}

/// Disks that nothing protects.
fn foreign(number: usize, filler: &str) -> Part {
    Part::same(&match number % 4 {
        0 => format!("<disk type='file' device='cdrom'>{filler}<target dev='sd{number}'/></disk>"),
        1 => format!("<disk type='network'><source protocol='rbd' name='p/{number}'/>{filler}</disk>"),
        2 => format!("<disk type='block'><source dev='/dev/mapper/volcrypt-o{number}'/>{filler}</disk>"),
        _ => format!("<disk>{filler}<driver type='qcow2'/><source file='/srv/{number}.qcow2'/></disk>"),
    })
}

fn device(hand: &Hand, number: usize, name: &str, order: bool, fillers: (&str, &str)) -> Part {
    let (volume, mut part) = (format!("d{number}"), Part::default());
    let raw = hand.path(&format!("/dev/protected/{name}/d{number}"));
    let kind = hand.attribute("type", "block");
    let device = hand.attribute("device", "disk");
    let (first, second) = if order { (&kind, &device) } else { (&device, &kind) };
    part.push_same(&format!("<disk {first}\n{second} >{}{}<source startupPolicy='optional' ", fillers.0, hand.space));
    part.push(&hand.attribute("dev", &raw), &hand.attribute("dev", &mapping(&volume)));
    part.push_same(&format!(">{}</source><target dev='vd{number}'/></disk>", fillers.1));
    part.entry = Some(format!(r#"<volcrypt:disk volume="{volume}" dev="{}"/>"#, escaped(&raw)));
    part.volume = Some(volume);
    part
}

fn file(hand: &Hand, number: usize, name: &str, has_type: bool, format: Format, fillers: (&str, &str)) -> Part {
    let (volume, mut part) = (format!("f{number}"), Part::default());
    let raw = hand.path(&format!("/srv/protected/{name}/f{number}.img"));
    let raw_type = if hand.references & 2 == 0 { "file" } else { "fil&#101;" };
    part.push_same("<disk");
    match has_type {
        true => {
            part.push_same(" device='disk' ");
            part.push(&hand.attribute("type", raw_type), &hand.attribute("type", "block"));
        }
        false => part.push("", " type='block'"),
    }
    part.push_same(&format!(">{}", fillers.0));
    let added = match format {
        Format::NoDriver => r#" driver="added""#,
        Format::None => {
            part.push("<driver\n cache='none'/>", "<driver type='raw'\n cache='none'/>");
            r#" driver="type-added""#
        }
        Format::Raw => {
            part.push_same(&format!("<driver {}/>", hand.attribute("type", "raw")));
            ""
        }
    };
    part.push_same(hand.space);
    if let Format::NoDriver = format {
        part.push("", &format!("<driver name='qemu' type='raw'/>{}", hand.indentation()));
    }
    part.push_same("<source\t");
    part.push(&hand.attribute("file", &raw), &hand.attribute("dev", &mapping(&volume)));
    part.push_same(&format!("/>{}<target dev='vd{number}'/></disk>", fillers.1));
    let kind = if has_type { format!(r#" type="{}""#, escaped(raw_type)) } else { String::new() };
    part.entry = Some(format!(r#"<volcrypt:disk volume="{volume}" file="{}"{kind}{added}/>"#, escaped(&raw)));
    part.volume = Some(volume);
    part
}

fn mapping(volume: &str) -> String {
    format!("/dev/mapper/volcrypt-{volume}")
}

fn escaped(raw: &str) -> String {
    raw.replace('&', "&amp;")
}

/// The note with these entries, at a place that is indented so.
fn note(entries: &[String], metadata: &str, indentation: &str) -> String {
    let inner = if indentation.is_empty() { String::new() } else { format!("{indentation}  ") };
    let entries: String = entries.iter().map(|entry| format!("{inner}{entry}")).collect();
    format!(r#"<volcrypt:disks xmlns:volcrypt="{NAMESPACE}"{metadata}>{entries}{indentation}</volcrypt:disks>"#)
}

/// A domain, as it is and as it has to be, and the volumes that its disks get, in their order.
pub fn domains() -> impl Strategy<Value = (String, String, Vec<String>)> {
    let disks = (0..6_usize).prop_flat_map(|count| (0..count).map(|number| disks(number).boxed()).collect::<Vec<_>>());
    let space = prop::sample::select(vec!["", " ", "\n  ", "\n\n\t", "\n"]);
    (disks, space, fillers(), 0..6_usize, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(disks, space, filler, metadata, crlf, mark, declared)| {
            let entries: Vec<String> = disks.iter().filter_map(|disk| disk.entry.clone()).collect();
            let mut whole = Part::default();
            whole.push_same(if mark { "\u{feff}" } else { "" });
            whole.push_same(if declared { "<?xml version='1.0' encoding='UTF-8'?>\n" } else { "" });
            whole.push_same(&format!("<!-- <metadata/> --><domain type='kvm'>{filler}<name>vm</name>"));
            put_metadata(&mut whole, metadata, space, &entries);
            whole.push_same("<devices>");
            for disk in &disks {
                whole.push_same("\n    ");
                whole.push(&disk.before, &disk.after);
            }
            whole.push_same("\n  </devices>\n</domain>\n<?end?>");
            let broken = |text: String| if crlf { text.replace('\n', "\r\n") } else { text };
            let volumes = disks.iter().filter_map(|disk| disk.volume.clone()).collect();
            (broken(whole.before), broken(whole.after), volumes)
        },
    )
}

fn put_metadata(whole: &mut Part, kind: usize, space: &str, entries: &[String]) {
    let outer = space.rfind('\n').map_or("", |at| &space[at..]);
    let inner = if outer.is_empty() { String::new() } else { format!("{outer}  ") };
    let changed = !entries.is_empty();
    whole.push_same(space);
    match kind {
        0 => {
            let note = note(entries, r#" metadata="absent""#, &inner);
            let added = format!("<metadata>{inner}{note}{outer}</metadata>{outer}");
            whole.push("", if changed { &added } else { "" });
        }
        1 | 2 => {
            let tag = if kind == 1 { "<metadata" } else { "<metadata a='/>' " };
            let note = note(entries, r#" metadata="empty""#, &inner);
            let filled = format!("{tag}>{inner}{note}{outer}</metadata>");
            let before = format!("{tag}/>");
            whole.push(&before, if changed { &filled } else { &before });
        }
        _ => {
            let content = ["", "<x xmlns='u'><disk/></x>", "<![CDATA[ ]]>"][kind % 3];
            whole.push_same("<metadata>");
            whole.push("", &if changed { format!("{outer}{}", note(entries, "", outer)) } else { String::new() });
            whole.push_same(&format!("{space}{content}</metadata >"));
        }
    }
}
