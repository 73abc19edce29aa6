//! Versions of the protocol.

use std::fmt;
use std::str::FromStr;

/// A version of the protocol. 1.0 to 1.4 are alike in what is used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 1 or 2.
    pub major: i32,
    /// 0 to 4.
    pub minor: i32,
}

/// The versions that are spoken here, the newest first.
pub const VERSIONS: [Version; 6] =
    [Version::NEWEST, version(1, 4), version(1, 3), version(1, 2), version(1, 1), Version::OLDEST];

const fn version(major: i32, minor: i32) -> Version {
    Version { major, minor }
}

impl Version {
    /// The newest one that is spoken here.
    pub const NEWEST: Version = version(2, 0);

    /// The oldest one that is spoken here.
    pub const OLDEST: Version = version(1, 0);

    /// The first one that says how a wrapped key is encoded.
    pub const WITH_ENCODING_OPTION: Version = version(1, 1);

    /// The first one in which a server can be asked for those that it speaks.
    pub const WITH_DISCOVERY: Version = version(1, 1);

    /// Whether each attribute has a tag of its own, as since 2.0.
    pub fn has_tagged_attributes(self) -> bool {
        self.major >= 2
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// It is none of the versions that are spoken here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidVersion;

impl FromStr for Version {
    type Err = InvalidVersion;

    fn from_str(text: &str) -> Result<Self, InvalidVersion> {
        VERSIONS.into_iter().find(|version| version.to_string() == text).ok_or(InvalidVersion)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_in_order_and_read_as_they_are_written() {
        assert!(VERSIONS.is_sorted_by(|one, other| one > other));
        for version in VERSIONS {
            assert_eq!(version.to_string().parse(), Ok(version));
        }
        for wrong in ["", "1", "1.5", "2.1", "2.00", "v2.0", " 2.0"] {
            assert_eq!(wrong.parse::<Version>(), Err(InvalidVersion), "{wrong}");
        }
    }
}
