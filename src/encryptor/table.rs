//! dm-crypt's table line: `Documentation/admin-guide/device-mapper/dm-crypt.rst` of Linux.

use super::MappingSpec;
use crate::volume::{DeviceNumber, VolumeId};

/// One target of a device-mapper table: start and length in sectors of 512 bytes, type, parameters.
pub type Target = (u64, u64, String, String);

/// The description of a volume's `logon` key while its table is loaded.
pub fn key_description(volume: &VolumeId) -> String {
    format!("volcrypt:{volume}")
}

/// The table of the mapping that `wanted` describes. It names the key and does not hold it.
///
/// The options stand in the order in which the kernel reports them, so a loaded table can be compared
/// with this one as text.
pub fn crypt_target(wanted: &MappingSpec<'_>) -> Target {
    let MappingSpec { record, profile, device, size_bytes, .. } = wanted;
    let sector_size = format!("sector_size:{}", record.sector_size);
    let options: Vec<&str> = [
        (profile.allow_discards, "allow_discards"),
        (profile.submit_from_crypt_cpus, "submit_from_crypt_cpus"),
        (profile.no_read_workqueue, "no_read_workqueue"),
        (profile.no_write_workqueue, "no_write_workqueue"),
        (record.sector_size != 512, sector_size.as_str()),
    ]
    .into_iter()
    .filter_map(|(on, option)| on.then_some(option))
    .collect();

    let mut parameters =
        format!("{} :{}:logon:{} 0 {device} 0", record.cipher, record.key_size.bytes(), key_description(&record.id));
    if !options.is_empty() {
        parameters.push_str(&format!(" {} {}", options.len(), options.join(" ")));
    }
    // A volume that grew by less than a unit of encryption is used up to its last whole one.
    let usable = size_bytes - size_bytes % u64::from(record.sector_size);
    (0, usable / 512, "crypt".to_owned(), parameters)
}

/// Whether both tables show the same data: one dm-crypt target with the same cipher, key, device,
/// offsets and unit of encryption. The length may differ, for a volume that grew while it is mapped,
/// and so may the options that only steer how dm-crypt works.
pub fn shows_the_same(one: &[Target], other: &[Target]) -> bool {
    let ([one], [other]) = (one, other) else { return false };
    let what = |(start, _, kind, parameters): &Target| {
        let words: Vec<String> = parameters.split(' ').map(str::to_owned).collect();
        let (format, options) = words.split_at(words.len().min(5));
        let matters = |option: &&String| option.starts_with("sector_size:") || *option == "iv_large_sectors";
        (*start, kind.clone(), format.to_vec(), options.iter().filter(matters).cloned().collect::<Vec<_>>())
    };
    what(one) == what(other)
}

/// The cipher and the device beneath, of the parameters of a dm-crypt target.
pub fn cipher_and_backing(parameters: &str) -> Option<(&str, DeviceNumber)> {
    let mut words = parameters.split(' ');
    let cipher = words.next()?;
    Some((cipher, DeviceNumber::parse(words.nth(2)?)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Key;
    use crate::policy::{KeySize, Profile, Provider};
    use crate::store::{EnrolledDevice, VolumeRecord, VolumeState};

    fn record(sector_size: u32) -> VolumeRecord {
        let id: VolumeId = "v1".parse().unwrap();
        let key_size = KeySize::try_from(512).unwrap();
        VolumeRecord {
            device: EnrolledDevice::default(),
            size_bytes: 1 << 30,
            profile: "default".to_owned(),
            provider: Provider::Plain,
            cipher: "aes-xts-plain64".to_owned(),
            key_size,
            sector_size,
            key: crate::keys::KeyHandle::first(&id),
            check_value: Key::random(key_size).unwrap().check_value(&id),
            enrolled_at: 0,
            state: VolumeState::Enrolled,
            owner: None,
            id,
        }
    }

    fn profile(options: bool) -> Profile {
        Profile {
            provider: Provider::Plain,
            cipher: "of the profile, which must not be used".to_owned(),
            key_size: KeySize::try_from(128).unwrap(),
            sector_size: 1024,
            allow_discards: options,
            no_read_workqueue: options,
            no_write_workqueue: options,
            submit_from_crypt_cpus: options,
        }
    }

    #[test]
    fn the_record_decides_what_stands_on_the_volume() {
        let (record, profile) = (record(512), profile(false));
        let device = DeviceNumber { major: 8, minor: 16 };
        let wanted = MappingSpec { record: &record, profile: &profile, device, size_bytes: 1 << 20, read_only: false };
        let parameters = "aes-xts-plain64 :64:logon:volcrypt:v1 0 8:16 0";
        assert_eq!(crypt_target(&wanted), (0, 2048, "crypt".to_owned(), parameters.to_owned()));
        assert_eq!(cipher_and_backing(parameters), Some(("aes-xts-plain64", device)));
    }

    #[test]
    fn options_stand_in_the_order_of_the_kernel() {
        let (record, profile) = (record(4096), profile(true));
        let device = DeviceNumber { major: 8, minor: 0 };
        let wanted = MappingSpec { record: &record, profile: &profile, device, size_bytes: 4096, read_only: false };
        assert_eq!(
            crypt_target(&wanted).3,
            "aes-xts-plain64 :64:logon:volcrypt:v1 0 8:0 0 \
             5 allow_discards submit_from_crypt_cpus no_read_workqueue no_write_workqueue sector_size:4096"
        );
    }

    #[test]
    fn only_what_changes_the_data_makes_another_table() {
        let table =
            |start, length, kind: &str, parameters: &str| vec![(start, length, kind.to_owned(), parameters.to_owned())];
        let wanted = table(0, 2048, "crypt", "aes-xts-plain64 :64:logon:volcrypt:v1 0 8:16 0 1 sector_size:4096");
        for same in [
            table(0, 4096, "crypt", "aes-xts-plain64 :64:logon:volcrypt:v1 0 8:16 0 1 sector_size:4096"),
            table(0, 2048, "crypt", "aes-xts-plain64 :64:logon:volcrypt:v1 0 8:16 0 2 allow_discards sector_size:4096"),
        ] {
            assert!(shows_the_same(&wanted, &same), "{same:?}");
        }
        for another in [
            table(0, 2048, "linear", "aes-xts-plain64 :64:logon:volcrypt:v1 0 8:16 0 1 sector_size:4096"),
            table(8, 2048, "crypt", "aes-xts-plain64 :64:logon:volcrypt:v1 0 8:16 0 1 sector_size:4096"),
            table(0, 2048, "crypt", "aes-cbc-plain64 :64:logon:volcrypt:v1 0 8:16 0 1 sector_size:4096"),
            table(0, 2048, "crypt", "aes-xts-plain64 :64:logon:volcrypt:v2 0 8:16 0 1 sector_size:4096"),
            table(0, 2048, "crypt", "aes-xts-plain64 :64:logon:volcrypt:v1 8 8:16 0 1 sector_size:4096"),
            table(0, 2048, "crypt", "aes-xts-plain64 :64:logon:volcrypt:v1 0 8:32 0 1 sector_size:4096"),
            table(0, 2048, "crypt", "aes-xts-plain64 :64:logon:volcrypt:v1 0 8:16 8 1 sector_size:4096"),
            table(0, 2048, "crypt", "aes-xts-plain64 :64:logon:volcrypt:v1 0 8:16 0"),
            table(
                0,
                2048,
                "crypt",
                "aes-xts-plain64 :64:logon:volcrypt:v1 0 8:16 0 2 sector_size:4096 iv_large_sectors",
            ),
            [wanted.clone(), wanted.clone()].concat(),
            Vec::new(),
        ] {
            assert!(!shows_the_same(&wanted, &another), "{another:?}");
        }
    }

    #[test]
    fn foreign_parameters_are_no_panic() {
        for parameters in ["", "a", "a b", "a b c", "a b c d", "a b c 8:", "a b c :0", "a b c 8:x 0"] {
            assert_eq!(cipher_and_backing(parameters), None, "{parameters:?}");
        }
    }
}
