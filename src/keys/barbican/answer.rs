//! What a server says to a question over HTTP, and why it says nothing.

use std::fmt;
use std::io::{self, Read};

use serde::de::DeserializeOwned;
use ureq::Body;
use ureq::http::HeaderMap;
use zeroize::Zeroizing;

use crate::keys::{Key, tls};
use crate::refusal::Refusal;
use crate::sys::memory::SecretPages;

/// The longest answer that is read, in bytes.
const LONGEST_ANSWER: usize = 1 << 20;
/// The longest volume key, in bytes.
const LONGEST_KEY: usize = 64;
/// How much of a server's own words is handed on, in characters.
const LONGEST_MESSAGE: usize = 200;

/// Why there is no answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// The server said no.
    Refused(Answered),
    /// Keystone does not believe that this host is who it says.
    NoToken(Answered),
    /// Barbican, or who answers in its place, does not believe the token that Keystone has just given.
    TokenRefused(Answered),
    /// What the server said makes no sense. The server and what is wrong.
    Malformed(String),
    /// The server could not be reached, or not in time. The server and the reason.
    Unreachable(String),
    /// Something on this side is not right: one sentence.
    Local(String),
    /// There is no memory for a key, or the like.
    Refusal(Refusal),
}

/// An answer that is no success.
#[derive(Debug)]
pub struct Answered {
    /// The HTTP status.
    pub status: u16,
    /// What the server says of it, for people.
    pub message: String,
    /// Whether it is written as Barbican writes what it refuses. A proxy before it answers otherwise.
    pub is_barbicans: bool,
}

impl fmt::Display for Answered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HTTP {}: {}", self.status, self.message)
    }
}

/// A success. Its body has not been read yet.
pub struct Answer {
    headers: HeaderMap,
    body: Body,
    host: String,
}

impl Answer {
    /// What `host` says.
    pub fn new(headers: HeaderMap, body: Body, host: &str) -> Self {
        Answer { headers, body, host: host.to_owned() }
    }

    /// A header that is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The answer's JSON.
    ///
    /// # Errors
    /// [`NoAnswer`].
    pub fn json<T: DeserializeOwned>(mut self) -> Result<T, NoAnswer> {
        let text = text(&mut self.body, &self.host)?;
        serde_json::from_slice(&text).map_err(|error| {
            NoAnswer::Malformed(format!("{}: its answer is not the JSON that it should be ({error})", self.host))
        })
    }

    /// The answer's bytes, which are a key, read into locked memory.
    ///
    /// # Errors
    /// [`NoAnswer`].
    pub fn key(mut self) -> Result<Key, NoAnswer> {
        let mut pages = SecretPages::new(LONGEST_KEY + 1)
            .map_err(|error| NoAnswer::Local(format!("no locked memory for a key ({error})")))?;
        let mut reader = self.body.as_reader();
        let mut length = 0;
        while length <= LONGEST_KEY {
            match reader.read(&mut pages.bytes_mut()[length..]).map_err(|error| broken_off(error, &self.host))? {
                0 => break,
                read => length += read,
            }
        }
        if length == 0 || length > LONGEST_KEY {
            let what = if length == 0 { "it is empty" } else { "it is longer than any key" };
            return Err(NoAnswer::Malformed(format!("{}: what it gave as the key is none ({what})", self.host)));
        }
        Key::filled(length, |room| {
            room.copy_from_slice(&pages.bytes()[..length]);
            Ok(())
        })
        .map_err(NoAnswer::Refusal)
    }
}

/// A body, in memory that is wiped.
fn text(body: &mut Body, host: &str) -> Result<Zeroizing<Vec<u8>>, NoAnswer> {
    let mut reader = body.as_reader();
    let mut text = Zeroizing::new(vec![0; 16 << 10]);
    let mut length = 0;
    loop {
        if length == text.len() {
            if length >= LONGEST_ANSWER {
                return Err(NoAnswer::Malformed(format!("{host}: its answer is longer than {LONGEST_ANSWER} bytes")));
            }
            let mut larger = Zeroizing::new(vec![0; length * 2]);
            larger[..length].copy_from_slice(&text);
            text = larger;
        }
        match reader.read(&mut text[length..]).map_err(|error| broken_off(error, host))? {
            0 => break,
            read => length += read,
        }
    }
    text.truncate(length);
    Ok(text)
}

/// What a server says in an answer that is no success: Barbican's and Keystone's own words, or where it points.
pub fn refused(status: u16, answer: &mut Answer) -> Answered {
    let request = answer.header("x-openstack-request-id").map(|id| format!(", request {id}")).unwrap_or_default();
    if let (300..400, Some(to)) = (status, answer.header("location")) {
        let message = cut(&format!("it points to {to}, which is not followed{request}"));
        return Answered { status, message, is_barbicans: false };
    }
    let text = text(&mut answer.body, &answer.host).ok();
    let value = text.and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok()).unwrap_or_default();
    let words = value.get("description").or_else(|| value.get("error")?.get("message"));
    let own = words.and_then(|words| words.as_str()).unwrap_or("it does not say why");
    // Its JSONErrorHook, also where it knows no such path; the description may be null.
    let is_barbicans = value.get("code").and_then(serde_json::Value::as_u64) == Some(status.into())
        && ["title", "description"].into_iter().all(|name| value.get(name).is_some());
    Answered { status, message: format!("{}{request}", cut(own)), is_barbicans }
}

fn cut(text: &str) -> String {
    text.trim_end_matches('.').chars().take(LONGEST_MESSAGE).collect()
}

/// Why there is no answer from `host`.
pub fn trouble(error: ureq::Error, host: &str) -> NoAnswer {
    let reason = match error {
        ureq::Error::Timeout(_) => "it did not answer in time".to_owned(),
        ureq::Error::HostNotFound => "its name has no address".to_owned(),
        ureq::Error::Rustls(error) => format!("no TLS connection ({})", tls::fault(&error)),
        ureq::Error::Io(error) => return broken_off(error, host),
        ureq::Error::ConnectionFailed => "it cannot be connected to".to_owned(),
        error => return NoAnswer::Malformed(format!("{host}: its answer is no HTTP that makes sense ({error})")),
    };
    NoAnswer::Unreachable(format!("{host}: {reason}"))
}

fn broken_off(error: io::Error, host: &str) -> NoAnswer {
    let reason = match error.get_ref() {
        Some(inner) if let Some(tls) = inner.downcast_ref::<rustls::Error>() => {
            format!("no TLS connection ({})", tls::fault(tls))
        }
        Some(inner) if let Some(ureq::Error::Timeout(_)) = inner.downcast_ref() => {
            "it did not answer in time".to_owned()
        }
        _ if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
            "it did not answer in time".to_owned()
        }
        _ if error.kind() == io::ErrorKind::UnexpectedEof => "it broke off the connection".to_owned(),
        _ => error.to_string(),
    };
    NoAnswer::Unreachable(format!("{host}: {reason}"))
}
