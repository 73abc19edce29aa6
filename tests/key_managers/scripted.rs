//! An HTTP server that says what it is told to say.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::authority::Authority;

/// What was asked.
#[derive(Clone)]
pub struct Request {
    /// `GET` and the like.
    pub method: String,
    /// The path and the query.
    pub target: String,
    /// All that came before the body.
    pub head: String,
    /// The body.
    pub body: Vec<u8>,
}

/// What comes back.
pub enum Reply {
    /// These bytes, all of them at once.
    Bytes(Vec<u8>),
    /// These bytes, one by one, with this pause before each.
    Drip(Vec<u8>, Duration),
    /// Nothing, ever.
    Hang,
}

impl Reply {
    /// A JSON answer with this status and further header lines.
    pub fn json(status: u16, headers: &str, body: &str) -> Reply {
        let length = body.len();
        let head = format!(
            "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{headers}connection: \
             close\r\n\r\n"
        );
        Reply::Bytes([head.as_bytes(), body.as_bytes()].concat())
    }

    /// The bytes of it.
    pub fn bytes(self) -> Vec<u8> {
        match self {
            Reply::Bytes(bytes) | Reply::Drip(bytes, _) => bytes,
            Reply::Hang => Vec::new(),
        }
    }
}

type Script = dyn Fn(&Request) -> Reply + Send + Sync;

/// A running server. Its threads end with the test.
pub struct Scripted {
    port: u16,
    script: Arc<Mutex<Arc<Script>>>,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl Scripted {
    /// One that answers as `script` says.
    pub fn start(script: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_with(None, script)
    }

    /// The same over TLS, with the certificate `name` of `authority`.
    pub fn start_tls(
        authority: &Authority,
        name: &str,
        script: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let chain = CertificateDer::pem_file_iter(authority.path(&format!("{name}.pem"))).unwrap().flatten().collect();
        let key = PrivateKeyDer::from_pem_file(authority.path(&format!("{name}.key"))).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        Self::start_with(Some(Arc::new(builder.with_no_client_auth().with_single_cert(chain, key).unwrap())), script)
    }

    fn start_with(tls: Option<Arc<ServerConfig>>, script: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let script: Arc<Script> = Arc::new(script);
        let server = Scripted { port, script: Arc::new(Mutex::new(script)), asked: Arc::default() };
        let (script, asked) = (Arc::clone(&server.script), Arc::clone(&server.asked));
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let (script, asked, tls) = (Arc::clone(&script), Arc::clone(&asked), tls.clone());
                // What breaks off ends that connection.
                std::thread::spawn(move || match tls {
                    Some(tls) => {
                        let mut stream = StreamOwned::new(ServerConnection::new(tls).unwrap(), socket);
                        let served = serve(&mut stream, &script, &asked);
                        stream.conn.send_close_notify();
                        let _ = stream.flush();
                        served
                    }
                    None => serve(&mut { socket }, &script, &asked),
                });
            }
        });
        server
    }

    /// Answers as `script` says from now on.
    pub fn answer(&self, script: impl Fn(&Request) -> Reply + Send + Sync + 'static) {
        *self.script.lock().unwrap() = Arc::new(script);
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What was asked since this was last called.
    pub fn asked(&self) -> Vec<Request> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

fn serve(stream: &mut (impl Read + Write), script: &Mutex<Arc<Script>>, asked: &Mutex<Vec<Request>>) -> io::Result<()> {
    let request = read(stream)?;
    asked.lock().unwrap().push(request.clone());
    let script = Arc::clone(&*script.lock().unwrap());
    match script(&request) {
        Reply::Bytes(bytes) => stream.write_all(&bytes)?,
        Reply::Drip(bytes, pause) => {
            for byte in bytes {
                std::thread::sleep(pause);
                stream.write_all(&[byte])?;
                stream.flush()?;
            }
        }
        Reply::Hang => std::thread::sleep(Duration::from_secs(600)),
    }
    stream.flush()
}

fn read(stream: &mut impl Read) -> io::Result<Request> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        bytes.extend_from_slice(&byte);
    }
    let head = String::from_utf8(bytes).unwrap();
    let length = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body)?;
    let mut words = head.split(' ').map(str::to_owned);
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    Ok(Request { method, target, head, body })
}

/// What the server on `port` of this machine says to `request`.
pub fn forward(port: u16, request: &Request) -> Reply {
    let mut bytes = Vec::new();
    let (first, rest) = request.head.split_once("\r\n").unwrap();
    let rest: Vec<&str> = rest.lines().filter(|line| !line.to_lowercase().starts_with("connection:")).collect();
    let head = format!("{first}\r\nconnection: close\r\n{}\r\n", rest.join("\r\n"));
    let answered = TcpStream::connect(("127.0.0.1", port)).and_then(|mut server| {
        server.write_all(head.as_bytes())?;
        server.write_all(&request.body)?;
        server.read_to_end(&mut bytes)
    });
    answered.unwrap();
    Reply::Bytes(bytes)
}
