//! The rewriter of disks: golden files in xml-fixtures/rewrite, and documents made at random. Each `NAME.xml` has a
//! `NAME.expected.xml`, or a `NAME.expected-error` with the sentence of the refusal.

#[path = "rewrite/documents.rs"]
mod documents;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use volcrypt::domain::{Domain, Facts, OnMapping, Source, rewrite, unrewrite};
use volcrypt::refusal::{Reason, Refusal};
use volcrypt::volume::VolumeId;

use self::documents::domains;

/// What libvirt reads and its schema does not describe: a second `<devices>`, and the type that oVirt gives the
/// `<seclabel>` of a source.
const BEYOND_THE_SCHEMA: [&str; 2] = ["several-devices", "ovirt"];

/// That of the note in the metadata.
const NAMESPACE: &str = "https://volcrypt.org/xmlns/libvirt/disks/1";

/// The rules of a host that has three volumes as /dev/sda to /dev/sdc, one as a multipath map, some in
/// /dev/protected, those of Cinder's targets, and images in /srv/protected.
fn judge(_: Option<&Facts>, source: &Source) -> Result<Option<VolumeId>, Refusal> {
    let of_target = |text: &str| {
        let (_, id) = text.split_once(":volume-")?;
        Some(id.split_once("-lun-").map_or(id, |(id, _)| id).to_owned())
    };
    let id = match source {
        Source::Path(path) => match path.to_str().unwrap() {
            "/dev/sda" => Some("vol-a".to_owned()),
            "/dev/sdb" => Some("vol-b".to_owned()),
            "/dev/sdc" => Some("vol-c".to_owned()),
            "/dev/sdy" => {
                let sentence = "rule \"backup\" denies /dev/sdy to every guest";
                return Err(Refusal::new(Reason::NotAllowed, sentence));
            }
            "/dev/mapper/mpatha" => Some("vol-m".to_owned()),
            text if text.starts_with("/dev/protected/") || text.starts_with("/srv/protected/") => {
                text.trim_end_matches(".img").rsplit('/').next().map(str::to_owned)
            }
            text => of_target(text),
        },
        Source::IscsiUnit { target, .. } => of_target(target),
        Source::Other => None,
    };
    id.map(|id| id.parse().map_err(|error| Refusal::new(Reason::Configuration, format!("{error}")))).transpose()
}

fn rewritten(xml: &str) -> Result<(String, Vec<OnMapping>), Refusal> {
    rewrite(xml, &judge).map(|rewritten| (rewritten.xml, rewritten.disks))
}

/// The inputs of the golden files, by name.
fn inputs() -> Vec<(String, PathBuf)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("xml-fixtures/rewrite");
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let inputs = files.filter_map(|path| {
        let name = path.file_name()?.to_str()?.strip_suffix(".xml")?.to_owned();
        (!name.ends_with(".expected")).then_some((name, path))
    });
    inputs.collect()
}

/// The volumes of the disks that a domain, or a lone disk, has on mappings.
fn on_mappings(xml: &str) -> BTreeSet<String> {
    let text = xml.trim_start_matches('\u{feff}');
    let domain = match Domain::parse(text) {
        Ok(domain) => domain,
        Err(_) => {
            let start = text.find("<disk").unwrap();
            let end = text.rfind("</disk>").unwrap() + "</disk>".len();
            Domain::parse(&format!("<domain><devices>{}</devices></domain>", &text[start..end])).unwrap()
        }
    };
    let volume = |source: Source| match source {
        Source::Path(path) => VolumeId::of_mapping(&path),
        _ => None,
    };
    domain.disks.into_iter().filter_map(|disk| volume(disk.source)).map(String::from).collect()
}

#[test]
fn disks_are_rewritten_as_the_golden_files_say() {
    let inputs = inputs();
    for (name, path) in &inputs {
        let input = fs::read_to_string(path).unwrap();
        let (good, bad) = (path.with_extension("expected.xml"), path.with_extension("expected-error"));
        assert!(good.exists() != bad.exists(), "{name} needs one expectation");
        match rewritten(&input) {
            Ok((xml, disks)) => {
                assert_eq!(xml, fs::read_to_string(&good).unwrap_or_default(), "{name}");
                assert_eq!(rewritten(&xml).unwrap(), (xml.clone(), Vec::new()), "{name}: a second time");
                let before = on_mappings(&input);
                let volumes = disks.into_iter().map(|disk| String::from(disk.volume));
                assert_eq!(on_mappings(&xml), volumes.chain(before.iter().cloned()).collect(), "{name}");
                check_inverse(name, &input, &xml);
            }
            Err(refusal) => {
                let sentence = refusal.to_string();
                assert_eq!(sentence + "\n", fs::read_to_string(&bad).unwrap_or_default(), "{name}");
            }
        }
    }
    assert!(inputs.len() >= 136, "only {} golden files were found", inputs.len());
}

/// A lone disk has none, and a domain that was rewritten before goes back to what it was then.
fn check_inverse(name: &str, input: &str, xml: &str) {
    let before = unrewrite(xml);
    if !xml.contains("</domain>") && !on_mappings(xml).is_empty() {
        assert!(before.unwrap_err().to_string().contains("a lone <disk> has no metadata"), "{name}");
    } else if input.contains(NAMESPACE) {
        assert!(!before.unwrap().contains("volcrypt"), "{name}");
    } else {
        assert_eq!(before.unwrap(), input, "{name}");
        assert_eq!(unrewrite(input).unwrap(), input, "{name}");
    }
}

#[test]
fn a_refusal_is_one_sentence() {
    for (name, path) in inputs() {
        if let Err(refusal) = rewritten(&fs::read_to_string(&path).unwrap()) {
            let sentence = refusal.to_string();
            assert!(!sentence.contains(char::is_control) && !sentence.ends_with('.'), "{name}: {sentence}");
        }
    }
}

/// Needs virt-xml-validate and xmllint, which tests/prerequisites installs.
#[test]
fn libvirts_schema_takes_every_rewritten_domain() {
    let mut seen = 0;
    for (name, path) in inputs() {
        let expected = path.with_extension("expected.xml");
        if !expected.exists() || BEYOND_THE_SCHEMA.contains(&name.as_str()) {
            continue;
        }
        if !fs::read_to_string(&expected).unwrap().contains("</domain>") {
            continue;
        }
        let output = Command::new("virt-xml-validate").arg(&expected).arg("domain").output();
        let output = output.expect("virt-xml-validate is there: tests/prerequisites installs it");
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        seen += 1;
    }
    assert!(seen >= 60, "only {seen} domains were validated");
}

/// A text of the golden files with some of it taken out, doubled, or put elsewhere.
fn edited() -> impl Strategy<Value = String> {
    let texts: Vec<String> = inputs().iter().map(|(_, path)| fs::read_to_string(path).unwrap()).collect();
    let edits = prop::collection::vec((0..3_u8, any::<[u16; 3]>(), prop::sample::select(SNIPPETS.to_vec())), 1..4);
    (prop::sample::select(texts), edits).prop_map(|(mut text, edits)| {
        for (kind, places, snippet) in edits {
            let mut places = places.map(|place| boundary(&text, usize::from(place) % (text.len() + 1)));
            places[..2].sort_unstable();
            let [from, to, elsewhere] = places;
            match kind {
                0 => text.replace_range(from..to.min(boundary(&text, from + 8)), ""),
                1 => text = [&text[..elsewhere], &text[from..to], &text[elsewhere..]].concat(),
                _ => text.insert_str(elsewhere, snippet),
            }
        }
        text
    })
}

/// The last place for a character that is not behind `place`.
fn boundary(text: &str, place: usize) -> usize {
    (0..=place.min(text.len())).rev().find(|place| text.is_char_boundary(*place)).unwrap_or(0)
}

const SNIPPETS: [&str; 12] = [
    "<source dev='/dev/sda'/>",
    "<disk type='block'><source dev='/dev/sdb'/></disk>",
    "<metadata/>",
    "<metadata>",
    " dev='/dev/sdc'",
    "/dev/sda",
    "<!--",
    "]]>",
    "'",
    ">",
    "\r",
    "&amp;",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn every_protected_disk_changes_and_nothing_else((before, after, volumes) in domains()) {
        let (xml, disks) = rewritten(&before).unwrap();
        prop_assert_eq!(&xml, &after);
        prop_assert_eq!(disks.into_iter().map(|disk| String::from(disk.volume)).collect::<Vec<_>>(), volumes);
        prop_assert_eq!(unrewrite(&xml).unwrap(), before.clone());
        prop_assert_eq!(unrewrite(&before).unwrap(), before.clone());
        prop_assert_eq!(rewritten(&xml).unwrap(), (xml.clone(), Vec::new()));
        // What reads the domain later finds the mappings.
        let read = |xml: &str| Domain::parse(xml).unwrap().disks;
        for (old, new) in read(&before).into_iter().zip(read(&xml)) {
            let volume = judge(None, &old.source).unwrap();
            let expected = volume.map_or(old.source, |volume| Source::Path(volume.mapping_path().into()));
            prop_assert_eq!((old.target, old.device, expected), (new.target, new.device, new.source));
        }
    }

    #[test]
    fn whatever_is_not_refused_goes_back(text in edited()) {
        let _ = unrewrite(&text);
        if let Ok((xml, disks)) = rewritten(&text) {
            prop_assert_eq!(rewritten(&xml).unwrap(), (xml.clone(), Vec::new()));
            if xml.contains("</domain>") && !text.contains(NAMESPACE) {
                prop_assert_eq!(unrewrite(&xml).unwrap(), text);
            } else if disks.is_empty() {
                prop_assert_eq!(xml, text);
            }
        }
    }
}
