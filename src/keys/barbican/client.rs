//! What is asked of Barbican (Key Manager API v1).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ureq::http::Method;
use zeroize::Zeroizing;

use super::answer::{Answer, NoAnswer};
use super::http::{Http, Question};
use super::keystone::{Token, authenticate};
use super::messages::{Consumer, Listing, Made, Metadata, Metadatum, NewSecret, Secret, id_of};
use super::{BarbicanConfig, to_json};
use crate::keys::Key;

/// How many secrets are listed at once. Barbican gives no more than 100.
const PAGE: usize = 100;
/// Consumers of secrets came with this version; a secret that has some is deleted by force only since the next one.
const VERSION: &str = "key-manager 1.2";
const JSON: &str = "application/json";

/// Asks Barbican, with a token that is used until it ends.
pub struct Client {
    config: BarbicanConfig,
    http: Http,
    token: Mutex<Option<Arc<Token>>>,
}

impl Client {
    /// A client for what `config` says. Nothing is connected yet.
    pub fn new(config: BarbicanConfig) -> Self {
        let http = Http::new(config.ca.clone());
        Client { config, http, token: Mutex::default() }
    }

    /// What it works by.
    pub fn config(&self) -> &BarbicanConfig {
        &self.config
    }

    /// Questions that all have to be answered within the deadline of the configuration, together.
    pub fn begin(&self) -> Asking<'_> {
        Asking { client: self, deadline: Instant::now() + self.config.deadline }
    }

    /// The id of the user that this host is to Barbican, and where that is.
    pub fn who_and_where(&self) -> (String, String) {
        let token = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        token.as_ref().map(|token| (token.user.clone(), token.barbican.clone())).unwrap_or_default()
    }

    /// A token that is good, as far as is known. Two threads may get one each: none waits for the other.
    fn token(&self, deadline: Instant) -> Result<Arc<Token>, NoAnswer> {
        let known = self.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match known {
            Some(token) if token.until > Instant::now() => Ok(token),
            _ => {
                let token = Arc::new(authenticate(&self.http, &self.config, deadline)?);
                *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&token));
                Ok(token)
            }
        }
    }

    fn forget(&self, token: &Arc<Token>) {
        let mut known = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_some_and(|known| Arc::ptr_eq(known, token)) {
            *known = None;
        }
    }
}

/// A question after the other, with one deadline for all of them.
pub struct Asking<'a> {
    client: &'a Client,
    deadline: Instant,
}

impl Asking<'_> {
    /// Waits for `pause`, which does not count.
    pub fn pause(&mut self, pause: Duration) {
        std::thread::sleep(pause);
        self.deadline += pause;
    }

    /// The same, with `most` for what is left to ask.
    pub fn within(&self, most: Duration) -> Self {
        Asking { client: self.client, deadline: self.deadline.min(Instant::now() + most) }
    }

    /// Gives the next question the whole deadline again.
    pub fn renew(&mut self) {
        self.deadline = Instant::now() + self.client.config.deadline;
    }

    /// Has Keystone give this host a token, and says where Barbican is.
    ///
    /// # Errors
    /// As all questions, [`NoAnswer`].
    pub fn introduce(&self) -> Result<String, NoAnswer> {
        Ok(self.client.token(self.deadline)?.barbican.clone())
    }

    /// One page of the secrets whose names are like `pattern`, oldest first, from `offset` on, and how many there are.
    /// In a pattern `%` and `_` stand for others, and Barbican's database decides about capitals.
    pub fn secrets(&self, pattern: &str, offset: usize) -> Result<(Vec<Secret>, usize), NoAnswer> {
        let pattern = pattern.replace('%', "%25");
        let path = format!("secrets?name={pattern}&limit={PAGE}&offset={offset}&sort=created:asc");
        let listing: Listing = self.send(Method::GET, &path, None, false)?.json()?;
        Ok((listing.secrets, listing.total))
    }

    /// The secret with this id, without the key that it is.
    pub fn secret(&self, id: &str) -> Result<Secret, NoAnswer> {
        self.send(Method::GET, &format!("secrets/{id}"), None, false)?.json()
    }

    /// What is kept beside a secret.
    pub fn metadata(&self, id: &str) -> Result<BTreeMap<String, String>, NoAnswer> {
        let answer = self.send(Method::GET, &format!("secrets/{id}/metadata"), None, false)?;
        Ok(answer.json::<Metadata<_>>()?.metadata)
    }

    /// Replaces all that is kept beside a secret, at once.
    pub fn put_metadata(&self, id: &str, metadata: &BTreeMap<String, String>) -> Result<(), NoAnswer> {
        let body = to_json(&Metadata { metadata });
        self.send(Method::PUT, &format!("secrets/{id}/metadata"), Some(&body), false).map(drop)
    }

    /// Adds to what is kept beside a secret. What is there already stays as it is.
    pub fn add_metadatum(&self, id: &str, key: &str, value: &str) -> Result<(), NoAnswer> {
        let body = to_json(&Metadatum { key, value });
        match self.send(Method::POST, &format!("secrets/{id}/metadata"), Some(&body), false) {
            Err(NoAnswer::Refused(answered)) if answered.status == 409 => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Keeps this beside a secret, in the place of what was there under the same name.
    pub fn replace_metadatum(&self, id: &str, key: &str, value: &str) -> Result<(), NoAnswer> {
        let body = to_json(&Metadatum { key, value });
        match self.send(Method::PUT, &format!("secrets/{id}/metadata/{key}"), Some(&body), false) {
            Err(NoAnswer::Refused(answered)) if answered.status == 404 => self.add_metadatum(id, key, value),
            outcome => outcome.map(drop),
        }
    }

    /// Takes away what is kept beside a secret under a name, if there is anything.
    pub fn remove_metadatum(&self, id: &str, key: &str) -> Result<(), NoAnswer> {
        match self.send(Method::DELETE, &format!("secrets/{id}/metadata/{key}"), None, false) {
            Err(NoAnswer::Refused(answered)) if answered.status == 404 => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Keeps `key` as a new secret; returns its id.
    pub fn store(&self, name: &str, key: &Key) -> Result<String, NoAnswer> {
        let mut room = Zeroizing::new(vec![0; key.bytes().len().div_ceil(3) * 4]);
        let unusable = |error| NoAnswer::Local(format!("the key cannot be encoded: {error}"));
        let length = STANDARD.encode_slice(key.bytes(), &mut room).map_err(|error| unusable(error.to_string()))?;
        let payload = std::str::from_utf8(&room[..length]).map_err(|error| unusable(error.to_string()))?;
        let body = to_json(&NewSecret {
            name,
            payload,
            payload_content_type: "application/octet-stream",
            payload_content_encoding: "base64",
            secret_type: "symmetric",
            algorithm: "aes",
            bit_length: key.bits(),
            mode: "xts",
        });
        let made: Made = self.send(Method::POST, "secrets", Some(&body), true)?.json()?;
        Ok(id_of(&made.secret_ref)?.to_owned())
    }

    /// The key that a secret is.
    pub fn payload(&self, id: &str) -> Result<Key, NoAnswer> {
        self.send_as(Method::GET, &format!("secrets/{id}/payload"), None, true, "application/octet-stream")?.key()
    }

    /// Deletes a secret, which Barbican refuses while somebody is said to use it. One that is gone is deleted already.
    pub fn delete(&self, id: &str) -> Result<(), NoAnswer> {
        match self.send(Method::DELETE, &format!("secrets/{id}"), None, false) {
            Err(NoAnswer::Refused(answered)) if answered.status == 404 => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Says that `consumer` uses a secret. To say it again changes nothing.
    pub fn consume(&self, id: &str, consumer: &Consumer) -> Result<(), NoAnswer> {
        let body = to_json(consumer);
        self.send(Method::POST, &format!("secrets/{id}/consumers"), Some(&body), false).map(drop)
    }

    /// Says that `consumer` does not use a secret any more. A secret that is gone nobody uses.
    pub fn release(&self, id: &str, consumer: &Consumer) -> Result<(), NoAnswer> {
        let body = to_json(consumer);
        match self.send(Method::DELETE, &format!("secrets/{id}/consumers"), Some(&body), false) {
            Err(NoAnswer::Refused(answered)) if answered.status == 404 => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    fn send(&self, method: Method, path: &str, body: Option<&[u8]>, secret: bool) -> Result<Answer, NoAnswer> {
        self.send_as(method, path, body, secret, JSON)
    }

    /// A token that Barbican does not take, because it was revoked or the clocks differ, is replaced once. That something is
    /// not there counts as said only by Barbican itself: a proxy says so of all while Barbican behind it is restarted.
    fn send_as(
        &self,
        method: Method,
        path: &str,
        body: Option<&[u8]>,
        secret: bool,
        accept: &str,
    ) -> Result<Answer, NoAnswer> {
        let mut renewed = false;
        loop {
            let token = self.client.token(self.deadline)?;
            let url = format!("{}/{path}", token.barbican);
            let question = Question {
                method: method.clone(),
                url: &url,
                token: Some(&token.value),
                body,
                accept,
                version: Some(VERSION),
                secret,
            };
            match self.client.http.ask(&question, self.deadline) {
                Err(NoAnswer::Refused(answered)) if answered.status == 401 => {
                    self.client.forget(&token);
                    if renewed {
                        return Err(NoAnswer::TokenRefused(answered));
                    }
                    renewed = true;
                }
                Err(NoAnswer::Refused(answered)) if answered.status == 404 && !answered.is_barbicans => {
                    let what = "which is no word of Barbican's: it may not be up, or the catalogue lead elsewhere";
                    return Err(NoAnswer::Malformed(format!("{}: {answered}, {what}", token.barbican)));
                }
                outcome => return outcome,
            }
        }
    }
}
