use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What the name of every mapping begins with; the volume's id follows.
pub const MAPPING_PREFIX: &str = "volcrypt-";
/// Where device-mapper's devices have their names.
const MAPPER_DIRECTORY: &str = "/dev/mapper";

/// The name of a volume: 1 to 64 ASCII letters, digits, `.`, `_` or `-`, the first one a letter or
/// a digit.
///
/// Device-mapper names, key descriptions and database rows are built from it, so nothing else ever
/// gets into one of those.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeId(String);

impl VolumeId {
    /// The longest id, in bytes. With its prefixes it has to fit a device-mapper name (127 bytes).
    pub const MAX_LENGTH: usize = 64;

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where the volume's mapping is while there is one.
    pub fn mapping_path(&self) -> String {
        format!("{MAPPER_DIRECTORY}/{MAPPING_PREFIX}{self}")
    }

    /// The volume whose mapping would be at `path`.
    pub fn of_mapping(path: &Path) -> Option<Self> {
        let name = path.strip_prefix(MAPPER_DIRECTORY).ok()?.to_str()?;
        name.strip_prefix(MAPPING_PREFIX)?.parse().ok()
    }
}

/// Whether `text` is 1 to `longest` ASCII letters, digits, `.`, `_` or `-`, the first one a letter or a digit.
pub(crate) fn is_id(text: &str, longest: usize) -> bool {
    text.len() <= longest
        && text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

impl FromStr for VolumeId {
    type Err = InvalidVolumeId;

    fn from_str(text: &str) -> Result<Self, InvalidVolumeId> {
        match is_id(text, Self::MAX_LENGTH) {
            true => Ok(VolumeId(text.to_owned())),
            false => Err(InvalidVolumeId(text.chars().take(80).collect())),
        }
    }
}

impl TryFrom<String> for VolumeId {
    type Error = InvalidVolumeId;

    fn try_from(text: String) -> Result<Self, InvalidVolumeId> {
        text.parse()
    }
}

impl From<VolumeId> for String {
    fn from(id: VolumeId) -> String {
        id.0
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A text that cannot be a volume id. Holds the first 80 characters of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidVolumeId(String);

impl fmt::Display for InvalidVolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is not a volume id: use 1 to {} letters, digits, '.', '_' or '-', the first a letter or a digit",
            self.0,
            VolumeId::MAX_LENGTH
        )
    }
}

impl std::error::Error for InvalidVolumeId {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_in_use_are_accepted() {
        for name in ["a", "0b1f7c1e-1111-4222-8333-444455556666", "vol_1.lun0", &"x".repeat(64)] {
            assert_eq!(name.parse::<VolumeId>().map(String::from).as_deref(), Ok(name));
        }
    }

    #[test]
    fn names_that_could_mean_something_elsewhere_are_refused() {
        let long = "x".repeat(65);
        for name in ["", ".", "..", "-x", "../x", "a/b", "a b", "a\0b", "a\n", "é", "a:b", long.as_str()] {
            assert!(name.parse::<VolumeId>().is_err(), "{name:?}");
        }
    }

    #[test]
    fn only_the_name_of_a_mapping_names_a_volume() {
        for path in
            ["/dev/mapper/volcrypt-", "/dev/mapper/volcrypt-a/b", "/dev/mapper/a", "/dev/volcrypt-a", "volcrypt-a"]
        {
            assert_eq!(VolumeId::of_mapping(Path::new(path)), None, "{path}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_is_safe_in_names(text in ".{0,100}") {
            if let Ok(id) = text.parse::<VolumeId>() {
                prop_assert_eq!(id.as_str(), &text);
                prop_assert!(text.len() <= 64 && text.is_ascii());
                prop_assert!(!text.contains(['/', '\0', ':', ' ', '%']) && !text.starts_with(['.', '-']));
                prop_assert_eq!(VolumeId::of_mapping(Path::new(&id.mapping_path())), Some(id));
            }
        }
    }
}
