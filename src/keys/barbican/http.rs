//! One question over HTTP: until a deadline, to one host, with an answer of limited length.

use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use ureq::http::{HeaderMap, Method, Request, Uri};
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{Connector, DefaultConnector};
use ureq::{Agent, Body};
use zeroize::Zeroizing;

use super::wiped::Wiping;
use crate::keys::Key;
use crate::keys::kmip::{certificates, tls_fault};
use crate::refusal::Refusal;
use crate::sys::memory::SecretPages;

/// The longest answer that is read, in bytes.
const LONGEST_ANSWER: usize = 1 << 20;
/// The longest volume key, in bytes.
const LONGEST_KEY: usize = 64;
/// How much of a server's own words is handed on, in characters.
const LONGEST_MESSAGE: usize = 200;
/// How long a server that has too much to do is left alone, if it does not say.
const PAUSE: Duration = Duration::from_secs(1);
/// How long at least.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);

/// Why there is no answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// The server said no.
    Refused(Answered),
    /// Keystone does not believe that this host is who it says, or Barbican does not believe Keystone's token.
    NoToken(Answered),
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
}

impl fmt::Display for Answered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HTTP {}: {}", self.status, self.message)
    }
}

/// A question.
pub struct Question<'a> {
    /// GET, POST, PUT or DELETE.
    pub method: Method,
    /// Where it goes, with the query.
    pub url: &'a str,
    /// What shows who asks.
    pub token: Option<&'a str>,
    /// The JSON that goes with it.
    pub body: Option<&'a [u8]>,
    /// The kind of answer that is asked for.
    pub accept: &'a str,
    /// The version of Barbican's interface.
    pub version: Option<&'a str>,
    /// Whether a key is in it or in its answer: the connection's memory is wiped afterwards.
    pub secret: bool,
}

/// A success. Its body has not been read yet.
pub struct Answer {
    headers: HeaderMap,
    body: Body,
    host: String,
}

impl Answer {
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

/// Asks servers.
pub struct Http {
    ca: Option<PathBuf>,
    agent: Mutex<Option<(Identity, Agent)>>,
}

/// What tells whether the file of authorities was replaced: inode, size and time of change.
type Identity = Option<(u64, u64, i64, i64)>;

impl Http {
    /// One that believes the authorities in the file `ca`.
    pub fn new(ca: Option<PathBuf>) -> Self {
        Http { ca, agent: Mutex::default() }
    }

    /// Has a server answer `question` until `deadline`. One that asks to be left alone for a while is asked again, if
    /// that is before the deadline.
    ///
    /// # Errors
    /// [`NoAnswer`].
    pub fn ask(&self, question: &Question<'_>, deadline: Instant) -> Result<Answer, NoAnswer> {
        let host = check_url(question.url).map_err(NoAnswer::Local)?;
        loop {
            let (status, mut answer) = self.ask_once(question, deadline, &host)?;
            if (200..300).contains(&status) {
                return Ok(answer);
            }
            let pause = answer.header("retry-after").and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
            let message = message(status, &mut answer);
            let refused = Answered { status, message };
            if !matches!(status, 429 | 503) {
                return Err(NoAnswer::Refused(refused));
            }
            let pause = pause.unwrap_or(PAUSE).max(SHORTEST_PAUSE);
            if Instant::now() + pause >= deadline {
                let sentence = format!("{host}: it has too much to do ({refused})");
                return Err(NoAnswer::Unreachable(sentence));
            }
            std::thread::sleep(pause);
        }
    }

    fn ask_once(&self, question: &Question<'_>, deadline: Instant, host: &str) -> Result<(u16, Answer), NoAnswer> {
        let agent = self.agent(question.url)?;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(NoAnswer::Unreachable(format!("{host}: it did not answer in time")));
        }
        let mut request =
            Request::builder().method(&question.method).uri(question.url).header("accept", question.accept);
        for (name, value) in [("x-auth-token", question.token), ("openstack-api-version", question.version)] {
            if let Some(value) = value {
                request = request.header(name, value);
            }
        }
        if question.secret {
            request = request.header("connection", "close");
        }
        let in_time = |request| agent.configure_request(request).timeout_global(Some(left)).build();
        let unusable = |error| NoAnswer::Local(format!("{host} cannot be asked: {error}"));
        let outcome = match question.body {
            Some(body) => {
                let request = request.header("content-type", "application/json").body(body).map_err(unusable)?;
                agent.run(agent.configure_request(request).timeout_global(Some(left)).build())
            }
            None => agent.run(in_time(request.body(()).map_err(unusable)?)),
        };
        let (parts, body) = outcome.map_err(|error| trouble(error, host))?.into_parts();
        Ok((parts.status.as_u16(), Answer { headers: parts.headers, body, host: host.to_owned() }))
    }

    /// What connections are made with: anew when the file of authorities was replaced.
    fn agent(&self, url: &str) -> Result<Agent, NoAnswer> {
        let identity = self.ca.as_deref().and_then(identity);
        let mut agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((made_with, agent)) = &*agent
            && *made_with == identity
        {
            return Ok(agent.clone());
        }
        let authorities = match &self.ca {
            Some(ca) => certificates(ca).map_err(NoAnswer::Local)?,
            None if url.starts_with("https:") => {
                return Err(NoAnswer::Local(format!("{url} needs ca = \"/path\" in the section [barbican]; add it")));
            }
            None => Vec::new(),
        };
        let authorities: Vec<_> = authorities.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .root_certs(RootCerts::new_with_certs(&authorities))
            .build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .proxy(None)
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("volcrypt/", env!("CARGO_PKG_VERSION")))
            .input_buffer_size(32 << 10)
            .output_buffer_size(16 << 10)
            .build();
        let new = Agent::with_parts(config, DefaultConnector::default().chain(Wiping), DefaultResolver::default());
        *agent = Some((identity, new.clone()));
        Ok(new)
    }
}

fn identity(path: &Path) -> Identity {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.size(), metadata.ctime(), metadata.ctime_nsec()))
}

/// Whether `url` may be asked: by https, or by http on this machine. Returns the host and port in it.
///
/// # Errors
/// One sentence.
pub fn check_url(url: &str) -> Result<String, String> {
    let parsed: Option<Uri> = url.parse().ok();
    let authority = parsed.as_ref().and_then(Uri::authority);
    let (Some(parsed), Some(authority)) = (&parsed, authority) else {
        return Err(format!("{url:?} is no URL; write \"https://HOST:PORT/…\""));
    };
    if authority.as_str().contains('@') {
        return Err(format!("{:?} has a user in it; leave that out", authority.host()));
    }
    let host = authority.host();
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).parse::<IpAddr>();
    let is_here = host == "localhost" || address.is_ok_and(|address| address.is_loopback());
    match parsed.scheme_str() {
        Some("https") => Ok(authority.to_string()),
        Some("http") if is_here => Ok(authority.to_string()),
        Some("http") => Err(format!("{url:?} would send keys in clear over the network; use https")),
        _ => Err(format!("{url:?} is no URL; write \"https://HOST:PORT/…\"")),
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

/// What a server says of an answer that is no success: Barbican's and Keystone's own words, or where it points.
fn message(status: u16, answer: &mut Answer) -> String {
    let request = answer.header("x-openstack-request-id").map(|id| format!(", request {id}")).unwrap_or_default();
    if let (300..400, Some(to)) = (status, answer.header("location")) {
        return cut(&format!("it points to {to}, which is not followed{request}"));
    }
    let own = text(&mut answer.body, &answer.host).ok().and_then(|text| {
        let value: serde_json::Value = serde_json::from_slice(&text).ok()?;
        let words = value.get("description").or_else(|| value.get("error")?.get("message"));
        words.and_then(|words| words.as_str()).map(str::to_owned)
    });
    format!("{}{request}", cut(own.as_deref().unwrap_or("it does not say why")))
}

fn cut(text: &str) -> String {
    text.trim_end_matches('.').chars().take(LONGEST_MESSAGE).collect()
}

fn trouble(error: ureq::Error, host: &str) -> NoAnswer {
    let reason = match error {
        ureq::Error::Timeout(_) => "it did not answer in time".to_owned(),
        ureq::Error::HostNotFound => "its name has no address".to_owned(),
        ureq::Error::Rustls(error) => format!("no TLS connection ({})", tls_fault(&error)),
        ureq::Error::Io(error) => return broken_off(error, host),
        ureq::Error::ConnectionFailed => "it cannot be connected to".to_owned(),
        error => return NoAnswer::Malformed(format!("{host}: its answer is no HTTP that makes sense ({error})")),
    };
    NoAnswer::Unreachable(format!("{host}: {reason}"))
}

fn broken_off(error: io::Error, host: &str) -> NoAnswer {
    let reason = match error.get_ref() {
        Some(inner) if let Some(tls) = inner.downcast_ref::<rustls::Error>() => {
            format!("no TLS connection ({})", tls_fault(tls))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_over_tls_or_stay_on_this_machine() {
        for url in [
            "https://barbican.example:9311/v1",
            "https://[2001:db8::1]/key-manager",
            "http://127.0.0.1:5000/v3",
            "http://[::1]:5000/v3",
            "http://localhost:5000",
        ] {
            assert!(check_url(url).is_ok(), "{url}");
        }
        for (url, what) in [
            ("http://barbican.example:9311", "in clear"),
            ("http://127.0.0.1.example", "in clear"),
            ("http://10.0.0.1", "in clear"),
            ("https://user@barbican.example", "has a user"),
            ("ftp://barbican.example", "no URL"),
            ("barbican.example:9311", "no URL"),
            ("/v3", "no URL"),
            ("", "no URL"),
        ] {
            let sentence = check_url(url).unwrap_err();
            assert!(sentence.contains(what), "{url}: {sentence}");
        }
    }
}
