use std::path::{Component, Path, PathBuf};

use crate::volume::DeviceNumber;

/// What the kernel announces a change of: where to look again. An event is a hint only; what counts is
/// what sysfs says when it is looked at.
#[derive(Debug, PartialEq, Eq)]
pub enum Subject {
    /// A block device.
    Block(DeviceNumber),
    /// The disk of a SCSI device, whose place below `/sys` this is: a character device passes commands to it.
    Scsi(PathBuf),
    /// Every device: one may have become another, with all that stands on it.
    Everything,
}

impl Subject {
    /// Reads a message of the kernel's: `ACTION@DEVPATH`, and then `KEY=VALUE`, each with a NUL at its end
    /// (lib/kobject_uevent.c). `None` for what the guard need not look at, and for what is no such message.
    pub fn of_message(message: &[u8]) -> Option<Self> {
        let mut fields = message.split(|&byte| byte == 0);
        fields.next().filter(|head| head.contains(&b'@'))?;
        let (mut action, mut subsystem, mut kind, mut place) = (None, None, None, None);
        let (mut major, mut minor) = (None, None);
        for field in fields {
            // Bytes that are not UTF-8 are in nothing that is looked at here.
            let Ok(field) = std::str::from_utf8(field) else { continue };
            match field.split_once('=') {
                Some(("ACTION", value)) => action = Some(value),
                Some(("SUBSYSTEM", value)) => subsystem = Some(value),
                Some(("DEVTYPE", value)) => kind = Some(value),
                Some(("DEVPATH", value)) => place = Some(value),
                Some(("MAJOR", value)) => major = value.parse().ok(),
                Some(("MINOR", value)) => minor = value.parse().ok(),
                _ => {}
            }
        }
        match (subsystem?, kind) {
            ("block", _) => Some(Subject::Block(DeviceNumber { major: major?, minor: minor? })),
            ("scsi", Some("scsi_device")) if action == Some("change") => Some(Subject::Everything),
            ("scsi_generic" | "bsg", _) => {
                // `…/2:0:0:1/scsi_generic/sg1`
                let place = below_sys(place?)?;
                let device = place.parent()?.parent().filter(|device| device.starts_with("devices"))?;
                Some(Subject::Scsi(device.to_owned()))
            }
            _ => None,
        }
    }
}

/// Whether the kernel announces something because it was asked to, as udev does whenever somebody who could write to a
/// device has closed it: Documentation/ABI/testing/sysfs-uevent.
pub fn was_asked_for(message: &[u8]) -> bool {
    message.split(|&byte| byte == 0).any(|field| field.starts_with(b"SYNTH_UUID="))
}

/// `/devices/…` as a path that cannot lead out of the tree.
fn below_sys(place: &str) -> Option<PathBuf> {
    let place = Path::new(place.strip_prefix('/')?);
    let plain = place.starts_with("devices") && place.components().all(|part| matches!(part, Component::Normal(_)));
    plain.then(|| place.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn subject(fields: &[&str]) -> Option<Subject> {
        Subject::of_message((fields.join("\0") + "\0").as_bytes())
    }

    const SCSI: &str = "devices/platform/host2/session1/target2:0:0/2:0:0:1";

    #[test]
    fn what_was_asked_for_is_no_news() {
        let device = "change@/devices/x/block/sda\0ACTION=change\0SUBSYSTEM=block\0";
        assert!(!was_asked_for(device.as_bytes()));
        assert!(was_asked_for(format!("{device}SYNTH_UUID=0\0SEQNUM=7\0").as_bytes()));
    }

    #[test]
    fn a_disk_is_told_by_its_number() {
        let head = format!("add@/{SCSI}/block/sda");
        let path = format!("DEVPATH=/{SCSI}/block/sda");
        let number = Some(Subject::Block(DeviceNumber { major: 8, minor: 16 }));
        assert_eq!(
            subject(&[&head, "ACTION=add", &path, "SUBSYSTEM=block", "MAJOR=8", "MINOR=16", "SEQNUM=4"]),
            number
        );
        // The order is the kernel's business.
        assert_eq!(subject(&[&head, "MINOR=16", "SUBSYSTEM=block", "MAJOR=8"]), number);
        assert_eq!(subject(&[&head, "SUBSYSTEM=block", "MAJOR=8"]), None);
        assert_eq!(subject(&[&head, "SUBSYSTEM=block", "MAJOR=8", "MINOR=-1"]), None);
    }

    #[test]
    fn what_passes_commands_leads_to_the_scsi_device() {
        let wanted = || Some(Subject::Scsi(SCSI.into()));
        for (subsystem, place) in [
            ("SUBSYSTEM=scsi_generic", format!("DEVPATH=/{SCSI}/scsi_generic/sg1")),
            ("SUBSYSTEM=bsg", format!("DEVPATH=/{SCSI}/bsg/2:0:0:1")),
        ] {
            assert_eq!(subject(&["add@/x", subsystem, &place]), wanted());
        }
        let changed = |kind| subject(&["change@/x", "ACTION=change", "SUBSYSTEM=scsi", kind]);
        assert_eq!(changed("DEVTYPE=scsi_device"), Some(Subject::Everything));
        assert_eq!(changed("DEVTYPE=scsi_host"), None);
        assert_eq!(subject(&["add@/x", "ACTION=add", "SUBSYSTEM=scsi", "DEVTYPE=scsi_device"]), None);
    }

    #[test]
    fn no_place_leads_out_of_the_tree() {
        for place in ["/devices/../../etc/x/y", "devices/x/y/z", "/etc/x/y", "//devices/x/y", "/devices", "", "/"] {
            let place = format!("DEVPATH={place}");
            let found = subject(&["add@/x", "SUBSYSTEM=scsi_generic", &place]);
            assert!(found.is_none(), "{place}: {found:?}");
        }
    }

    #[test]
    fn udevs_own_messages_and_other_subsystems_are_nothing() {
        assert_eq!(Subject::of_message(b"libudev\0\xfe\xed\xca\xfe"), None);
        assert_eq!(subject(&["add@/x", "SUBSYSTEM=net", "MAJOR=1", "MINOR=1"]), None);
        assert_eq!(Subject::of_message(b""), None);
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_place_below_sys_or_nothing(
            fields in prop::collection::vec(
                prop_oneof![
                    Just(b"SUBSYSTEM=block".to_vec()), Just(b"SUBSYSTEM=bsg".to_vec()), Just(b"DEVTYPE=scsi_device".to_vec()),
                    Just(b"SUBSYSTEM=scsi".to_vec()), Just(b"DEVPATH=/devices/../x/y".to_vec()),
                    "DEVPATH=/devices(/[a-z.\u{1}]{0,3}){0,6}".prop_map(String::into_bytes),
                    "(MAJOR|MINOR)=[0-9-]{0,12}".prop_map(String::into_bytes),
                    prop::collection::vec(any::<u8>(), 0..40),
                ],
                0..10,
            )
        ) {
            let message = [b"add@/x".to_vec()].into_iter().chain(fields).collect::<Vec<_>>().join(&0);
            if let Some(Subject::Scsi(place)) = Subject::of_message(&message) {
                prop_assert!(place.starts_with("devices"), "{place:?}");
                prop_assert!(place.components().all(|part| matches!(part, Component::Normal(_))), "{place:?}");
            }
        }
    }
}
