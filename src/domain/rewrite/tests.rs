use super::*;

const DISK: &str = "<disk type='block'><source dev='/dev/sda'/><target dev='vda'/></disk>";
const FILE: &str = "<disk>\n      <source file='/srv/a.img'/>\n    </disk>";

/// A host with one volume, /dev/sda or /srv/a.img.
fn judge(_: Option<&Facts>, source: &Source) -> Result<Option<VolumeId>, Refusal> {
    match source {
        Source::Path(path) if ["/dev/sda", "/srv/a.img"].map(Some).contains(&path.to_str()) => {
            Ok(Some("a".parse().unwrap()))
        }
        _ => Ok(None),
    }
}

fn domain(disk: &str) -> String {
    format!("<domain>\n  <name>vm</name>\n  <devices>\n    {disk}\n  </devices>\n</domain>\n")
}

fn rewritten(xml: &str) -> String {
    let xml = rewrite(xml, &judge).unwrap().xml;
    assert!(xml.contains("'/dev/mapper/volcrypt-a'"), "{xml}");
    xml
}

fn refused(xml: &str) -> String {
    rewrite(xml, &judge).expect_err(xml).to_string()
}

#[test]
fn the_judge_hears_which_domain_asks() {
    let asked = |xml: &str| {
        let name = std::cell::RefCell::new(None);
        let outcome = rewrite(xml, &|domain: Option<&Facts>, _: &Source| {
            name.replace(domain.map(|facts| facts.name.clone()));
            Ok(None)
        });
        assert_eq!(outcome.unwrap(), Rewritten { xml: xml.to_owned(), disks: Vec::new() });
        name.into_inner()
    };
    assert_eq!(asked(&domain(DISK)).as_deref(), Some("vm"));
    assert_eq!(asked(DISK), None);
}

#[test]
fn the_changed_disks_are_listed() {
    let changed = OnMapping { target: "vda".to_owned(), volume: "a".parse().unwrap() };
    for xml in [domain(DISK), DISK.to_owned()] {
        assert_eq!(rewrite(&xml, &judge).unwrap().disks.as_slice(), std::slice::from_ref(&changed));
    }
}

#[test]
fn a_prefix_of_no_namespace_is_refused() {
    for disk in [
        "<p:disk xmlns:p='' type='block'><source dev='/dev/sda'/></p:disk>",
        "<disk type='block'><p:source xmlns:p='' dev='/dev/sda'/></disk>",
        "<disk type='block'><source xmlns:p='' p:dev='/dev/sda'/></disk>",
    ] {
        assert!(refused(&domain(disk)).contains("of the namespace "), "{disk}");
    }
}

#[test]
fn what_is_too_long_is_not_read() {
    let longest = " ".repeat(MAX_XML - DISK.len()) + DISK;
    assert!(rewrite(&longest, &judge).is_ok());
    let sentence = format!("the XML is longer than {MAX_XML} bytes");
    assert_eq!(refused(&format!(" {longest}")), sentence);
    assert_eq!(unrewrite(&format!(" {longest}")).unwrap_err().to_string(), sentence);
}

/// libxml2 stops at some hundred levels; the stack of the daemon's threads must not be what stops here.
#[test]
fn deep_nesting_takes_no_stack() {
    let deep = MAX_XML / 30;
    let nested = format!("{}{DISK}{}", "<disk><source>".repeat(deep), "</source></disk>".repeat(deep));
    let thread = std::thread::Builder::new().stack_size(256 << 10).spawn(move || {
        refused(&domain(&nested));
        rewritten(&domain(DISK).replace("<name>", &"<name>".repeat(deep)).replace("</name>", &"</name>".repeat(deep)));
    });
    thread.unwrap().join().unwrap();
}

#[test]
fn white_space_is_not_multiplied() {
    let xml = domain(DISK).replace("  <devices>", &format!("{}<devices>", " ".repeat(100_000)));
    let changed = rewritten(&xml);
    assert!(changed.len() < xml.len() + 500, "{}", changed.len());
    assert_eq!(unrewrite(&changed).unwrap(), xml);
}

#[test]
fn other_metadata_that_came_later_stays() {
    let without = domain(DISK);
    for (before, after) in [
        (without.clone(), without.replace("  <devices>", "  <metadata><x/>\n  </metadata>\n  <devices>")),
        (
            without.replace("<name>", "<metadata/><name>"),
            without.replace("<name>", "<metadata><x/>\n  </metadata><name>"),
        ),
    ] {
        let more = rewritten(&before).replace("</volcrypt:disks>", "</volcrypt:disks><x/>");
        assert_eq!(unrewrite(&more).unwrap(), after);
    }
}

#[test]
fn what_was_changed_since_then_stays() {
    let changed = rewritten(&domain(FILE));
    assert!(
        changed.contains("<disk type='block'>\n      <driver name='qemu' type='raw'/>\n      <source dev="),
        "{changed}"
    );
    // A driver that does more now.
    let again = unrewrite(&changed.replace("type='raw'/>", "type='raw' cache='none'/>")).unwrap();
    let driver = "<disk>\n      <driver name='qemu' type='raw' cache='none'/>\n      <source file='/srv/a.img'/>";
    assert!(again.contains(driver), "{again}");
    // Another source, or none.
    for other in ["/dev/sdb", "/dev/mapper/volcrypt-b"] {
        let again = unrewrite(&changed.replace("/dev/mapper/volcrypt-a", other)).unwrap();
        assert!(again.contains(&format!("<source dev='{other}'/>")) && !again.contains("metadata"), "{again}");
    }
    assert_eq!(
        unrewrite(&rewritten(&domain(DISK)).replace(&DISK.replace("/dev/sda", "/dev/mapper/volcrypt-a"), "")).unwrap(),
        domain("")
    );
}

/// libvirt writes an element's attributes in an order and with quotes of its own, and puts the metadata elsewhere.
#[test]
fn a_text_that_libvirt_has_written_anew_goes_back_to_the_same_disks() {
    let xml = domain(r#"<disk><driver cache="none" /><source file="/srv/it's/&quot;a&quot;.img"/></disk>"#);
    let judge = |_: Option<&Facts>, source: &Source| match source {
        Source::Path(path) if path.to_str() == Some("/srv/it's/\"a\".img") => Ok(Some("a".parse().unwrap())),
        _ => Ok(None),
    };
    let changed = rewrite(&xml, &judge).unwrap().xml;
    let (start, end) = (changed.find("<metadata>").unwrap(), changed.find("</metadata>").unwrap() + 11);
    let metadata = changed[start..end].to_owned();
    let anew = changed
        .replace(&metadata, "")
        .replace("</name>", &format!("</name>\n  {}", metadata.replace('\n', "")))
        .replace(r#"<disk type='block'>"#, r#"<disk type='block' device='disk'>"#)
        .replace(r#"<driver type='raw' cache="none" />"#, "<driver cache='none' type='raw'/>")
        .replace(r#"dev="/dev/mapper/volcrypt-a""#, "index='1' dev='/dev/mapper/volcrypt-a'");
    let again = unrewrite(&anew).unwrap();
    let disk = r#"<disk device='disk'><driver cache='none'/><source index='1' file='/srv/it&apos;s/&quot;a&quot;.img'/></disk>"#;
    assert!(again.contains(disk) && !again.contains("metadata"), "{again}");
    let read = |xml: &str| super::super::Domain::parse(xml).unwrap().disks;
    assert_eq!(read(&again), read(&xml));
}

#[test]
fn a_lone_disk_has_no_way_back() {
    let sentence = unrewrite(&rewritten(DISK)).unwrap_err().to_string();
    assert!(sentence.starts_with("disk vda: a lone <disk> has no metadata"), "{sentence}");
    assert_eq!(unrewrite(DISK).unwrap(), DISK);
}

#[test]
fn a_note_that_was_not_written_here_gets_nothing_else_in() {
    let changed = rewritten(&domain(FILE));
    let forged = |from: &str, to: &str| {
        assert!(changed.contains(from), "{from} is not in {changed}");
        unrewrite(&changed.replace(from, to)).map_err(|refusal| refusal.to_string())
    };
    for (from, to) in [
        (r#" volume="a""#, ""),
        (r#" volume="a""#, r#" volume="../a""#),
        (r#" file="/srv/a.img""#, ""),
        (r#" file="/srv/a.img""#, r#" file="x" dev="y""#),
        (r#" file="/srv/a.img""#, r#" file="&lt;x/>""#),
        (r#" file="/srv/a.img""#, r#" file="&amp;x;""#),
        (r#" file="/srv/a.img""#, r#" file="&amp;""#),
        (r#" driver="added""#, r#" driver="x""#),
        (r#" metadata="absent""#, r#" metadata="x""#),
    ] {
        let sentence = forged(from, to).expect_err(to);
        assert!(sentence.contains("metadata is damaged: "), "{sentence}");
    }
    let quoted = forged(r#"file="/srv/a.img""#, r#"file="' x='&quot;""#).unwrap();
    assert!(quoted.contains(r#"file='&apos; x=&apos;"'"#), "{quoted}");
}

#[test]
fn a_lone_device_is_rewritten_if_it_is_a_disk_and_no_other() {
    assert_eq!(rewrite_device(DISK, &judge).unwrap(), DISK.replace("/dev/sda", "/dev/mapper/volcrypt-a"));
    assert_eq!(lone_disk(DISK).unwrap().source, Source::Path("/dev/sda".into()));
    for other in ["<interface type='x'><source dev='/dev/sda'/></interface>", "<domain/>", "<!-- -->\n<rng a=\"'\"/>\n"]
    {
        assert_eq!(rewrite_device(other, &judge).unwrap(), other);
        assert_eq!(lone_disk(other), None);
    }
    let host_device = "<hostdev mode='subsystem' type='x'><source dev='/dev/sda'/></hostdev>";
    assert!(rewrite_device(host_device, &judge).unwrap_err().to_string().contains("gets around its encryption"));
    for alike in ["<a:disk xmlns:a='x'/>", "<hostdev xmlns='x'/>"] {
        assert!(rewrite_device(alike, &judge).unwrap_err().to_string().starts_with("the device is a <"), "{alike}");
        assert_eq!(lone_disk(alike), None);
    }
    for broken in ["", "<disk>", "<disk/><disk/>", "<!DOCTYPE disk []><disk/>"] {
        assert!(rewrite_device(broken, &judge).is_err() && lone_disk(broken).is_none(), "{broken}");
    }
}

#[test]
fn the_note_says_where_a_volume_was() {
    assert!(sources_before(&domain(DISK)).unwrap().is_empty());
    let note = sources_before(&rewritten(&domain(DISK))).unwrap();
    assert_eq!(note, HashMap::from([("a".parse().unwrap(), PathBuf::from("/dev/sda"))]));
    // As libvirt reads it, whatever stood between the quotes.
    let disk = DISK.replace("'/dev/sda'", "\"/dev/&apos;a&amp;&#x22;\"");
    let any = |_: Option<&Facts>, _: &Source| Ok(Some("b".parse().unwrap()));
    let xml = rewrite(&domain(&disk), &any).unwrap().xml;
    assert_eq!(sources_before(&xml).unwrap(), HashMap::from([("b".parse().unwrap(), PathBuf::from("/dev/'a&\""))]));
}
