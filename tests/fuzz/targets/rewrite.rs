//! Any text, and any sequence of what domains are made of: refused, or rewritten so that a second time changes
//! nothing and the way back gives every byte. No note from outside makes the way back panic.

#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use volcrypt::domain::{Domain, Facts, Source, rewrite, unrewrite};
use volcrypt::refusal::Refusal;
use volcrypt::volume::VolumeId;

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    Text(&'a str),
    Domain { before: &'a str, parts: Vec<Part<'a>>, disks: Vec<Vec<Part<'a>>>, after: Vec<Part<'a>> },
}

#[derive(Arbitrary, Debug)]
enum Part<'a> {
    Text(&'a str),
    Usual(u8),
}

/// What the disks and the metadata of a domain are made of.
const USUAL: [&str; 32] = [
    "<metadata/>",
    "<metadata ></metadata>",
    "<metadata>\r\n  <x/></metadata>\r\n  ",
    "<metadata><v:disks xmlns:v='https://volcrypt.org/xmlns/libvirt/disks/1' metadata='absent'>",
    "<v:disk volume='a' dev='/dev/sda'/>",
    "<v:disk volume='b' file='&amp;amp;' type='file' driver='added'/>",
    "</v:disks></metadata>",
    "<devices>",
    "</devices>\n  ",
    "\n    <disk type='block'>",
    "<disk>",
    "</disk>",
    "<source dev='/dev/sda'/>",
    "\n      <source file = \"/dev/sdb\">",
    "</source>",
    "<source dev='/dev/mapper/volcrypt-a'/>",
    "<source protocol='iscsi' name='iqn.a:sdc/1'/>",
    "<driver name='qemu'/>",
    "<driver name='qemu' type='raw'/>",
    "<backingStore>",
    "</backingStore>",
    "<mirror/>",
    "<encryption/>",
    "<target dev='vda'/>",
    "<hostdev><source dev='/dev/sdd'/></hostdev>",
    "<n:source xmlns:n='n' n:dev='/dev/sda'/>",
    "<name>vm</name>",
    "<!-- > -->",
    "<![CDATA[<disk>]]>",
    "<?pi?>",
    "&amp;",
    "\t",
];

impl Part<'_> {
    fn text(&self) -> &str {
        match self {
            Part::Text(text) => text,
            Part::Usual(which) => USUAL[usize::from(*which) % USUAL.len()],
        }
    }
}

fn text(parts: &[Part<'_>]) -> String {
    parts.iter().map(Part::text).collect()
}

/// A host whose volumes are named as their devices are.
fn judge(_: Option<&Facts>, source: &Source) -> Result<Option<VolumeId>, Refusal> {
    let name = match source {
        Source::Path(path) => path.to_str().and_then(|path| path.strip_prefix("/dev/sd")),
        Source::IscsiUnit { target, .. } => target.split_once(":sd").map(|(_, name)| name),
        Source::Other => None,
    };
    Ok(name.and_then(|name| name.parse().ok()))
}

fuzz_target!(|input: Input<'_>| {
    let xml = match input {
        Input::Text(text) => text.to_owned(),
        Input::Domain { before, parts, disks, after } => {
            let disk = |parts: &Vec<Part<'_>>| format!("<disk type='block'>{}</disk>", text(parts));
            let disks: String = disks.iter().map(disk).collect();
            format!("{before}<domain>{}<devices>{disks}</devices>{}</domain>", text(&parts), text(&after))
        }
    };
    let _ = unrewrite(&xml);
    let Ok(rewritten) = rewrite(&xml, &judge) else { return };
    let again = rewrite(&rewritten.xml, &judge).expect("what was rewritten can be read");
    assert!(again.disks.is_empty() && again.xml == rewritten.xml, "a second time changes {}", rewritten.xml);
    if rewritten.disks.is_empty() {
        assert_eq!(rewritten.xml, xml);
    }
    if let Ok(domain) = Domain::parse(&rewritten.xml) {
        let protected = domain.disks.iter().filter(|disk| judge(None, &disk.source).expect("a judgement").is_some());
        assert_eq!(protected.count(), 0, "a disk was left out of {}", rewritten.xml);
        // Where there was a note, the way back leads to what it says.
        if !xml.contains("https://volcrypt.org/xmlns/libvirt/disks/1") {
            assert_eq!(unrewrite(&rewritten.xml).expect("the way back"), xml);
        }
    }
});
