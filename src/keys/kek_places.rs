//! Where key-encryption keys are kept: systemd's credentials, and files in the database's directory.

use std::path::{Path, PathBuf};

use super::kek::{self, CREDENTIAL, FILE_NAME, KeyEncryptionKey};
use super::secret_file::{self, Trust};
use super::{CheckValue, KekHome};
use crate::refusal::{Reason, Refusal};

/// What is added to the name of a credential or a file that holds the key which is to take the other's place.
const NEW: &str = ".new";

/// The credentials of the service and the database's directory, as places of key-encryption keys.
pub(super) struct KekPlaces {
    credentials: Option<PathBuf>,
    directory: PathBuf,
}

/// What stands in one of the places.
pub(super) struct Found {
    /// Which kind of place it is.
    pub(super) home: KekHome,
    /// Its path.
    pub(super) path: PathBuf,
    /// The key, or what is wrong with it.
    pub(super) kek: Result<KeyEncryptionKey, Refusal>,
    /// Whether it is the place of the one that is to come.
    is_new: bool,
}

impl Found {
    /// Whether it is the credential of the key in use.
    pub(super) fn is_credential(&self) -> bool {
        self.home == KekHome::Credential && !self.is_new
    }

    /// Whether it is the key with this check value.
    pub(super) fn is(&self, value: CheckValue) -> bool {
        self.kek.as_ref().is_ok_and(|kek| kek.check_value() == value)
    }
}

impl KekPlaces {
    pub(super) fn new(credentials: Option<&Path>, directory: &Path) -> Self {
        KekPlaces { credentials: credentials.map(Path::to_owned), directory: directory.to_owned() }
    }

    /// The one key of a database that was never used with one: see [`KeyEncryptionKey::load`].
    pub(super) fn first(&self, may_create: bool) -> Result<KeyEncryptionKey, Refusal> {
        KeyEncryptionKey::load(self.credentials.as_deref(), &self.directory, may_create)
    }

    /// What there is. A file is passed over for the credential of the same meaning, except while a key from a file
    /// may be on its way out for one from a credential (`rotating`).
    pub(super) fn read(&self, rotating: bool) -> Vec<Found> {
        let mut all = Vec::new();
        for suffix in ["", NEW] {
            let is_new = !suffix.is_empty();
            let credential = self
                .credentials
                .as_ref()
                .and_then(|folder| found(folder.join(format!("{CREDENTIAL}{suffix}")), KekHome::Credential, is_new));
            let passed_over = credential.is_some() && (is_new || !rotating);
            all.extend(credential);
            if !passed_over {
                all.extend(found(self.file(suffix), KekHome::File, is_new));
            }
        }
        all
    }

    /// The key that is to take the place of `old`, on the disk. It is made if the keys are kept in files and there is
    /// none.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when it is missing or unusable, [`Reason::Configuration`] when it would leave the
    /// credential for a file, and when a file would come beside a credential that is passed over.
    pub(super) fn successor(&self, old: CheckValue) -> Result<CheckValue, Refusal> {
        let all = self.read(true);
        let Some(old_home) = all.iter().find(|found| found.is(old)).map(|found| found.home) else {
            return Err(no_key(format!(
                "the key-encryption key in use (check value {old}) is not in {} any more, only in the daemon's memory: put it \
                 back, from backup, before it is replaced, and what is there now under another name",
                self.names()
            )));
        };
        let passed_over = all.iter().any(|found| found.is_credential() && !found.is(old));
        let new = match all.into_iter().find(|found| found.is_new) {
            // It would be passed over for that credential afterwards.
            None | Some(Found { home: KekHome::File, .. }) if passed_over => {
                return Err(Refusal::new(
                    Reason::Configuration,
                    format!(
                        "the key-encryption key in use (check value {old}) is that of {}, and the credential {CREDENTIAL} is \
                         another one: in the drop-in of volcryptd.service, name that credential {CREDENTIAL}{NEW} to have it \
                         take the file's place, or remove it, run 'systemctl restart volcryptd' and repeat",
                        self.file("").display()
                    ),
                ));
            }
            // Nothing is sealed to be laid open afterwards.
            Some(Found { home: KekHome::File, path, .. }) if old_home == KekHome::Credential => {
                return Err(Refusal::new(
                    Reason::Configuration,
                    format!(
                        "the key-encryption key comes from the credential {CREDENTIAL}, and {} is a mere file: remove it and \
                         provide the new one as the credential {CREDENTIAL}{NEW}",
                        path.display()
                    ),
                ));
            }
            Some(new) => new,
            None if old_home == KekHome::Credential => {
                return Err(no_key(format!(
                    "the key-encryption key comes from the credential {CREDENTIAL}, which volcrypt cannot replace: add the new \
                     one to a drop-in of volcryptd.service as the credential {CREDENTIAL}{NEW}, run 'systemctl restart \
                     volcryptd' and repeat"
                )));
            }
            None => {
                let path = self.file(NEW);
                let kek = KeyEncryptionKey::create(&path);
                Found { home: KekHome::File, path, kek, is_new: true }
            }
        };
        let kek = new.kek?;
        if kek.is_blank() {
            return Err(no_key(format!(
                "{} (the new key-encryption key) is one byte over and over and not random: provide another one",
                new.path.display()
            )));
        }
        if new.home == KekHome::File {
            let failed = |error| no_key(format!("{} cannot be written to the disk: {error}", new.path.display()));
            secret_file::sync(&new.path).map_err(failed)?;
        }
        Ok(kek.check_value())
    }

    /// Drops `old`, which wraps nothing any more, as far as it is kept in a file, and has `new` in its place, if that is
    /// one as well. Says where `new` is kept. At every moment `new` is on the disk.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when `new` is nowhere, a file holds a third key, or one cannot be removed.
    pub(super) fn drop_old(&self, old: CheckValue, new: CheckValue) -> Result<KekHome, Refusal> {
        let (kek, kek_new) = (self.file(""), self.file(NEW));
        let all = self.read(true);
        let at = |path: &Path| all.iter().find(|found| found.path == path);
        let Some(home) = all.iter().find(|found| found.is(new)).map(|found| found.home) else {
            return Err(no_key(format!(
                "the new key-encryption key (check value {new}) is gone: restore it from backup"
            )));
        };
        if let Some(other) = at(&kek)
            && !other.is(old)
            && !other.is(new)
        {
            return Err(no_key(format!(
                "{} is neither the old key-encryption key ({old}) nor the new one ({new}): move it away and run 'volcrypt key \
                 rotate-kek' again",
                kek.display()
            )));
        }
        let result = match (home, at(&kek)) {
            (KekHome::Credential, Some(found)) if found.is(old) => secret_file::remove(&kek),
            (KekHome::Credential, _) => Ok(()),
            (KekHome::File, Some(found)) if found.is(new) => match at(&kek_new) {
                Some(copy) if copy.is(new) => secret_file::remove(&kek_new),
                _ => Ok(()),
            },
            (KekHome::File, _) => secret_file::replace(&kek_new, &kek),
        };
        result.and_then(|()| secret_file::sweep(&self.directory)).map_err(|error| {
            no_key(format!(
                "all keys are rewrapped, but {} (the old key-encryption key) cannot be removed ({error}): mend that and run \
                 'volcrypt key rotate-kek' again",
                kek.display()
            ))
        })?;
        Ok(home)
    }

    /// How a key that is missing is put back without the loss of another one, for messages.
    pub(super) fn way_back(&self) -> String {
        let [kek, new] = ["", NEW].map(|suffix| self.file(suffix));
        match [&kek, &new].into_iter().find(|path| path.symlink_metadata().is_err()) {
            Some(free) => format!("restore it from backup as {}, or as the credential {CREDENTIAL}", free.display()),
            None => format!(
                "keep {0} and {1} under other names first, and restore those that are needed from backup as {0} and {1}",
                kek.display(),
                new.display()
            ),
        }
    }

    /// The file of the key in use, if it is kept in one.
    pub(super) fn own_file(&self) -> PathBuf {
        self.file("")
    }

    fn file(&self, suffix: &str) -> PathBuf {
        self.directory.join(format!("{FILE_NAME}{suffix}"))
    }

    /// The places in which a key is looked for, for messages.
    pub(super) fn names(&self) -> String {
        format!("the credential {CREDENTIAL} or {}", self.file("").display())
    }
}

/// The file in `directory` that holds the key-encryption key with this check value; none if it is in no file.
pub fn kek_file(directory: &Path, value: CheckValue) -> Option<PathBuf> {
    // There may be a credential of the same meaning.
    let all = KekPlaces::new(None, directory).read(true);
    all.into_iter().find(|found| found.is(value)).map(|found| found.path)
}

fn found(path: PathBuf, home: KekHome, is_new: bool) -> Option<Found> {
    let trust = match home {
        KekHome::Credential => Trust::Directory,
        KekHome::File => Trust::Mode,
    };
    kek::read(&path, trust).transpose().map(|kek| Found { home, path, kek, is_new })
}

fn no_key(sentence: String) -> Refusal {
    Refusal::new(Reason::NoKey, sentence)
}
