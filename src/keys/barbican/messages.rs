//! The JSON that Barbican takes and gives (Key Manager API v1).

use serde::{Deserialize, Serialize};

use super::answer::NoAnswer;
use crate::domain::is_uuid;

/// What Barbican says of a secret, apart from the secret.
#[derive(Deserialize)]
pub struct Secret {
    /// Its name, which need not be its own.
    #[serde(default)]
    pub name: Option<String>,
    /// When it was made.
    pub created: String,
    /// Where it is: an URL that ends in its id.
    secret_ref: String,
    /// The size of the key, as its maker gave it.
    #[serde(default)]
    pub bit_length: Option<u32>,
    /// Who uses it.
    #[serde(default)]
    pub consumers: Vec<Consumer>,
}

impl Secret {
    /// Its id, a UUID.
    ///
    /// # Errors
    /// When there is none.
    pub fn id(&self) -> Result<&str, NoAnswer> {
        id_of(&self.secret_ref)
    }
}

/// A page of secrets.
#[derive(Deserialize)]
pub struct Listing {
    /// Those on this page.
    pub secrets: Vec<Secret>,
    /// How many there are on all pages.
    pub total: usize,
}

/// What comes back when a secret was made.
#[derive(Deserialize)]
pub struct Made {
    /// Where it is: an URL that ends in its id.
    pub secret_ref: String,
}

/// All that is kept beside a secret.
#[derive(Serialize, Deserialize)]
pub struct Metadata<T> {
    /// Names and values.
    pub metadata: T,
}

/// One thing that is kept beside a secret.
#[derive(Serialize)]
pub struct Metadatum<'a> {
    /// Its name.
    pub key: &'a str,
    /// 255 characters at most.
    pub value: &'a str,
}

/// A secret to be made.
#[derive(Serialize)]
pub struct NewSecret<'a> {
    /// Its name, which need not be its own.
    pub name: &'a str,
    /// The secret itself.
    pub payload: &'a str,
    /// What it is.
    pub payload_content_type: &'a str,
    /// How it is written.
    pub payload_content_encoding: &'a str,
    /// `symmetric` for a key.
    pub secret_type: &'a str,
    /// What the key is for.
    pub algorithm: &'a str,
    /// The size of the key.
    pub bit_length: usize,
    /// What the key is for.
    pub mode: &'a str,
}

/// Who uses a secret.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Consumer {
    /// The program.
    pub service: String,
    /// Whose it is.
    pub resource_type: String,
    /// What tells it from others of the kind: 36 characters at most.
    pub resource_id: String,
}

/// The id at the end of a reference. Where else it points counts for nothing.
pub fn id_of(reference: &str) -> Result<&str, NoAnswer> {
    let id = reference.rsplit('/').next().unwrap_or_default();
    match is_uuid(id) {
        true => Ok(id),
        false => Err(NoAnswer::Malformed("Barbican: its answer names a secret without an id".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_id_is_taken_from_a_reference() {
        let id = "dfe2418f-8205-4e90-816a-4e8ea2366b48";
        assert_eq!(id_of(&format!("http://elsewhere/v1/secrets/{id}")).unwrap(), id);
        for wrong in ["", "http://x/v1/secrets/", "../../x", "dfe2418f-8205-4e90-816a-4e8ea2366b4?", "a/b"] {
            assert!(id_of(wrong).is_err(), "{wrong}");
        }
    }
}
