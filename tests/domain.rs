//! Golden files: what is read of the domains in xml-fixtures/domain, or why they are refused. Each
//! `NAME.xml` has a `NAME.expected`.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use volcrypt::domain::{Disk, Domain, Source};

fn describe(xml: &str) -> String {
    let domain = match Domain::parse(xml) {
        Ok(domain) => domain,
        Err(error) => return format!("error: {error}\n"),
    };
    let emulator = domain.emulator.map_or("none".to_owned(), |path| path.display().to_string());
    let uuid = domain.uuid.unwrap_or("none".to_owned());
    let owner = domain.owner.map_or(String::new(), |owner| format!("owner: {owner}\n"));
    let mut text = format!("name: {}\nuuid: {uuid}\n{owner}emulator: {emulator}\n", domain.name);
    for disk in &domain.disks {
        writeln!(text, "disk {} ({}): {}", disk.target, disk.device, images(disk)).unwrap();
    }
    text
}

/// The image of a disk, and those on which it stands.
fn images(disk: &Disk) -> String {
    let image = |source: &Source, is_looked_into| {
        let source = match source {
            Source::Path(path) => format!("path {}", path.display()),
            Source::IscsiUnit { target, lun } => format!("LUN {lun} of {target}"),
            Source::Other => "other".to_owned(),
        };
        if is_looked_into { source + " on what libvirt finds in it" } else { source }
    };
    disk.images().map(|of| image(of.source, of.is_looked_into)).collect::<Vec<_>>().join(" on ")
}

#[test]
fn domains_are_read_as_the_golden_files_say() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("xml-fixtures/domain");
    let mut seen = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "xml") {
            let expected = fs::read_to_string(path.with_extension("expected")).unwrap();
            assert_eq!(describe(&fs::read_to_string(&path).unwrap()), expected, "{}", path.display());
            seen += 1;
        }
    }
    assert!(seen >= 14, "only {seen} golden files were found");
}
