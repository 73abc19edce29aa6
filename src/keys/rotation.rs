//! The replacement of the key-encryption key, as a client of the daemon sees it.

use serde::{Deserialize, Serialize};

use super::CheckValue;
use crate::volume::VolumeId;

/// What is to be done for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RotationStep {
    /// To begin it, or to take up one that was broken off. No key is rewrapped yet.
    Begin,
    /// To rewrap some keys, and to drop the old key-encryption key once it wraps none.
    GoOn {
        /// Those after the record with this volume and version; from the first on if nothing is said.
        after: Option<(VolumeId, u32)>,
    },
}

/// What came of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KekRotation {
    /// It is under way.
    UnderWay {
        /// The check value of the key-encryption key that is on its way out.
        old: CheckValue,
        /// That of the one which takes its place.
        new: CheckValue,
        /// Whether it was begun before.
        resumed: bool,
        /// How many keys the old one still wraps.
        remaining: u64,
        /// The last record that was looked at.
        after: Option<(VolumeId, u32)>,
    },
    /// It is over: the old key-encryption key wraps nothing any more.
    Finished {
        /// The check value of the new one.
        new: CheckValue,
        /// Where that is kept.
        home: KekHome,
        /// How many keys it wraps.
        keys: u64,
    },
}

/// Where a key-encryption key is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KekHome {
    /// In a credential of the service, which volcrypt only reads.
    Credential,
    /// In a file in the database's directory.
    File,
}
