//! How a key is handed out: in clear within TLS, or wrapped by another key that the server and this host both have, so
//! that it is in clear neither there nor in the buffers of TLS (KMIP 1.4, sections 2.1.5, 2.1.6 and 4.11).
//!
//! A host that is told to have keys wrapped neither asks for one that is not nor takes it. They are wrapped by AES key
//! wrap (RFC 3394), which notices another key and anything that was changed.

use std::path::PathBuf;

use aws_lc_rs::key_wrap::{AES_128, AES_256, AesKek, KeyWrap};

use super::Fault;
use super::client::Talk;
use super::connection::Trouble;
use super::message::{Answer, Failure, Request, State};
use crate::keys::Key;
use crate::keys::secret_file::{self, Trust};
use crate::volume::VolumeId;

/// By how many bytes a wrapped key is longer.
const LONGER: usize = 8;
/// The most that is read of a file, so that one that is too long is told by its length.
const LONGEST_FILE: usize = 4096;
const PURPOSE: &str = "the key that the KMIP server wraps others by";

/// The key that servers wrap others by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappingKey {
    /// What the servers call it: its unique identifier.
    pub identifier: String,
    /// The file that holds the same key on this host.
    pub file: PathBuf,
}

impl WrappingKey {
    /// Reads the key from its file, as it is done anew for every key that is fetched.
    ///
    /// # Errors
    /// One sentence that names the file and says what is wrong with it.
    pub fn read(&self) -> Result<AesKek, String> {
        let shown = self.file.display();
        let key = secret_file::read(&self.file, PURPOSE, Trust::Mode, LONGEST_FILE)
            .map_err(|refusal| refusal.to_string())?
            .ok_or_else(|| format!("{shown} ({PURPOSE}) is not there: put the bytes of that key into it"))?;
        let cipher = match key.bytes().len() {
            16 => &AES_128,
            32 => &AES_256,
            length => {
                return Err(format!(
                    "{shown} ({PURPOSE}) has {length} bytes, and a key that others can be unwrapped with has 16 or 32: \
                     put the bytes of that key into it as they are"
                ));
            }
        };
        AesKek::new(cipher, key.bytes()).map_err(|_| format!("{shown} ({PURPOSE}) cannot be used"))
    }
}

/// Has the key `identifier` of `volume` handed out, in the way that the configuration says.
pub(super) fn take(talk: &Talk<'_>, volume: &VolumeId, identifier: &str) -> Result<Key, Fault> {
    let Some(wrapping) = &talk.config().wrapping_key else {
        let answer = talk.ask(&Request::get(identifier))?;
        let bytes = answer.key(identifier)?;
        let key = Key::filled(bytes.len(), |room| {
            room.copy_from_slice(bytes);
            Ok(())
        });
        return Ok(key?);
    };
    let kek = wrapping.read().map_err(Trouble::Local)?;
    let answer = match talk.ask(&Request::get_wrapped(identifier, &wrapping.identifier)) {
        Ok(answer) => answer,
        Err(Trouble::Refused(failure)) => return Err(why_refused(talk, volume, wrapping, failure).into()),
        Err(older @ Trouble::Older(_)) => {
            let what =
                format!("{older}, which that takes: set a newer newest_version in [kmip], or name another server");
            return Err(not_wrapped(talk, volume, wrapping, &what).into());
        }
        Err(trouble) => return Err(trouble.into()),
    };
    unwrap(kek, &answer, volume, identifier, wrapping)
}

/// Takes the wrapped key from `answer`, straight into locked memory.
fn unwrap(
    kek: AesKek,
    answer: &Answer,
    volume: &VolumeId,
    identifier: &str,
    wrapping: &WrappingKey,
) -> Result<Key, Fault> {
    let other = &wrapping.identifier;
    let wrapped = answer.wrapped_key(identifier, other).map_err(|malformed| {
        Trouble::Unwrapped(format!(
            "the KMIP server was asked for the key of volume {volume} wrapped by its key {other}, and {malformed}, so \
             it was not used: have its administrator see that it wraps keys by AES key wrap (RFC 3394, NIST Key Wrap) \
             without encoding, or remove wrapping_key and wrapping_key_file from [kmip] if keys may come in clear within \
             TLS"
        ))
    })?;
    let length = wrapped.len().saturating_sub(LONGER);
    let mut is_right = false;
    let key = Key::filled(length, |room| {
        is_right = kek.unwrap(wrapped, room).is_ok_and(|unwrapped| unwrapped.len() == length);
        Ok(())
    })?;
    if is_right {
        return Ok(key);
    }
    let sentence = format!(
        "the key of volume {volume} (object {identifier}), wrapped by the KMIP server's key {other}, cannot be \
         unwrapped with {}: put the bytes of key {other} into that file, or have the administrator see what was \
         changed on the way",
        wrapping.file.display()
    );
    Err(Trouble::Unwrapped(sentence).into())
}

/// Why a server does not hand out a wrapped key: what it says of the wrapping key is asked for, because it refuses with
/// the same words where it is the volume's key that this host may not have.
fn why_refused(talk: &Talk<'_>, volume: &VolumeId, wrapping: &WrappingKey, refused: Failure) -> Trouble {
    let other = &wrapping.identifier;
    let is_right = |failure: &Failure| failure.is_not_found() || failure.is_not_allowed();
    let fault = match talk.ask(&Request::get_usage(other)) {
        Ok(answer) => match answer.usage(other) {
            Ok((State::Active, true)) if is_right(&refused) => return Trouble::Refused(refused),
            Ok((State::Active, true)) => format!(
                "it does not wrap by it (reason {}: {}): have its administrator see that it can wrap keys by AES key \
                 wrap (RFC 3394, NIST Key Wrap) without encoding",
                refused.reason, refused.message
            ),
            Ok((State::Active, false)) => {
                "that one may not be used for it: have its administrator add Wrap Key to its cryptographic usage mask"
                    .to_owned()
            }
            Ok((State::PreActive, _)) => "that one was not activated: have its administrator activate it".to_owned(),
            Ok((State::Revoked | State::Destroyed, _)) => {
                "that one was revoked: have its administrator make another one, and name it in wrapping_key and put it \
                 into wrapping_key_file on every host"
                    .to_owned()
            }
            Err(malformed) => format!("what it says of that one makes no sense ({malformed}): name an AES key there"),
        },
        Err(Trouble::Refused(failure)) if is_right(&failure) => {
            "it has no such key that this host may see: correct wrapping_key in [kmip], or have its administrator give \
             this host the right to Get and Get Attributes it"
                .to_owned()
        }
        Err(trouble) => return trouble,
    };
    not_wrapped(talk, volume, wrapping, &fault)
}

fn not_wrapped(talk: &Talk<'_>, volume: &VolumeId, wrapping: &WrappingKey, what: &str) -> Trouble {
    Trouble::Unwrapped(format!(
        "the KMIP server {} is to wrap the key of volume {volume} by its key {}, but {what}",
        talk.name(),
        wrapping.identifier
    ))
}

#[cfg(test)]
mod tests;
