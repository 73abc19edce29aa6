//! What stands between a client and a real KMIP server, and spoils the answers to one operation.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};

use super::authority::Authority;

/// What becomes of an answer.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Nothing.
    None,
    /// Only so many bytes of it are handed on, and the connection ends.
    Cut(usize),
    /// So many of them are handed on, and of those after them nothing.
    CutAfter(usize),
    /// It comes byte by byte, with this pause before each.
    Slow(Duration),
    /// The request is handed on only after this pause.
    Late(Duration),
    /// The same, for one request.
    LateOnce(Duration),
    /// It never comes.
    Hang,
    /// The server has done one request, and the connection ends before it is answered.
    CutOnce,
    /// These bytes come instead.
    Instead(Vec<u8>),
    /// These bytes come instead, and the server is not asked.
    Refused(Vec<u8>),
    /// The byte at a place of it is another one.
    Byte(usize, u8),
}

/// A running proxy. Its threads end with the test.
pub struct Proxy {
    port: u16,
    fault: Arc<Mutex<(u8, Fault)>>,
    connections: Arc<AtomicUsize>,
    longest: Arc<AtomicUsize>,
    /// The versions of the requests, in order.
    versions: Arc<Mutex<Vec<(u8, u8)>>>,
    /// All that was handed on, in both directions.
    traffic: Arc<Mutex<Vec<u8>>>,
    /// How many of the first connections get no answer any more.
    forgotten: Arc<AtomicUsize>,
}

impl Proxy {
    /// A proxy before `server` that shows the certificate `name` of `authority`.
    pub fn start(authority: &Authority, name: &str, server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy {
            port: listener.local_addr().unwrap().port(),
            fault: Arc::new(Mutex::new((0, Fault::None))),
            connections: Arc::default(),
            longest: Arc::default(),
            versions: Arc::default(),
            traffic: Arc::default(),
            forgotten: Arc::default(),
        };
        let (inside, outside) = (server_side(authority, name), client_side(authority));
        let (fault, connections) = (Arc::clone(&proxy.fault), Arc::clone(&proxy.connections));
        let (longest, forgotten) = (Arc::clone(&proxy.longest), Arc::clone(&proxy.forgotten));
        let (versions, traffic) = (Arc::clone(&proxy.versions), Arc::clone(&proxy.traffic));
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let number = connections.fetch_add(1, Ordering::Relaxed);
                let (inside, outside, server) = (Arc::clone(&inside), Arc::clone(&outside), server.clone());
                let (fault, longest, forgotten) = (Arc::clone(&fault), Arc::clone(&longest), Arc::clone(&forgotten));
                let (versions, traffic) = (Arc::clone(&versions), Arc::clone(&traffic));
                // What every message has to pass before it is handed on.
                let seen = move |message: &[u8]| {
                    traffic.lock().unwrap().extend_from_slice(message);
                    if message[2] == RESPONSE_MESSAGE {
                        return;
                    }
                    versions.lock().unwrap().push(version(message));
                    if number < forgotten.load(Ordering::Relaxed) {
                        std::thread::sleep(Duration::from_secs(600));
                    }
                };
                // What breaks off ends that connection.
                std::thread::spawn(move || relay(socket, inside, outside, &server, &fault, &longest, seen));
            }
        });
        proxy
    }

    /// Spoils the answers to `operation` from now on.
    pub fn spoil(&self, operation: u8, fault: Fault) {
        *self.fault.lock().unwrap() = (operation, fault);
    }

    /// Answers nothing any more on the connections that there are, as a firewall that has forgotten them.
    pub fn forget_connections(&self) {
        self.forgotten.store(self.connections(), Ordering::Relaxed);
    }

    /// Where it listens.
    pub fn address(&self) -> String {
        format!("localhost:{}", self.port)
    }

    /// How many connections there were.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Whether `bytes` were in anything that it has handed on.
    pub fn has_carried(&self, bytes: &[u8]) -> bool {
        self.traffic.lock().unwrap().windows(bytes.len()).any(|part| part == bytes)
    }

    /// The versions of KMIP in which it was asked since this was called last, each time another one as `(major,
    /// minor)`.
    pub fn versions(&self) -> Vec<(u8, u8)> {
        let mut versions = std::mem::take(&mut *self.versions.lock().unwrap());
        versions.dedup();
        versions
    }

    /// The length of the longest answer to the operation that is spoilt, in bytes.
    pub fn longest_answer(&self) -> usize {
        self.longest.load(Ordering::Relaxed)
    }
}

/// The last byte of the tag of an answer.
const RESPONSE_MESSAGE: u8 = 0x7b;

/// Has `server` answer one request of the client that `authority` has issued a certificate for.
pub fn exchange(authority: &Authority, server: &str, request: &[u8]) -> Vec<u8> {
    let name = ServerName::try_from("localhost").unwrap();
    let session = ClientConnection::new(client_side(authority), name).unwrap();
    let mut stream = StreamOwned::new(session, TcpStream::connect(server).unwrap());
    stream.write_all(request).unwrap();
    message(&mut stream).unwrap()
}

fn server_side(authority: &Authority, name: &str) -> Arc<ServerConfig> {
    let chain = CertificateDer::pem_file_iter(authority.path(&format!("{name}.pem"))).unwrap().flatten().collect();
    let key = PrivateKeyDer::from_pem_file(authority.path(&format!("{name}.key"))).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Arc::new(builder.with_no_client_auth().with_single_cert(chain, key).unwrap())
}

fn client_side(authority: &Authority) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority.path("ca.pem")).unwrap()).unwrap();
    let chain = vec![CertificateDer::from_pem_file(authority.path("client.pem")).unwrap()];
    let key = PrivateKeyDer::from_pem_file(authority.path("client.key")).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Arc::new(builder.with_root_certificates(roots).with_client_auth_cert(chain, key).unwrap())
}

fn relay(
    socket: TcpStream,
    inside: Arc<ServerConfig>,
    outside: Arc<ClientConfig>,
    server: &str,
    fault: &Mutex<(u8, Fault)>,
    longest: &AtomicUsize,
    seen: impl Fn(&[u8]),
) -> io::Result<()> {
    let mut client = StreamOwned::new(ServerConnection::new(inside).unwrap(), socket);
    // Only what has a TLS connection is a client.
    let mut request = message(&mut client)?;
    let name = ServerName::try_from("localhost").unwrap();
    let mut server = StreamOwned::new(ClientConnection::new(outside, name).unwrap(), TcpStream::connect(server)?);
    loop {
        seen(&request);
        let is_spoilt = fault.lock().unwrap().0 == operation(&request);
        let fault = if is_spoilt { next(&mut fault.lock().unwrap().1) } else { Fault::None };
        if let Fault::Late(pause) = fault {
            std::thread::sleep(pause);
        }
        if let Fault::Refused(bytes) = &fault {
            client.write_all(bytes)?;
            client.flush()?;
            request = message(&mut client)?;
            continue;
        }
        server.write_all(&request)?;
        let mut answer = message(&mut server)?;
        seen(&answer);
        if is_spoilt {
            longest.fetch_max(answer.len(), Ordering::Relaxed);
        }
        match fault {
            Fault::None | Fault::Late(_) | Fault::LateOnce(_) => client.write_all(&answer)?,
            Fault::Cut(length) => {
                client.write_all(&answer[..length.min(answer.len())])?;
                return client.flush();
            }
            Fault::CutAfter(_) | Fault::CutOnce => return Ok(()),
            Fault::Slow(pause) => {
                for byte in answer {
                    std::thread::sleep(pause);
                    client.write_all(&[byte])?;
                    client.flush()?;
                }
            }
            Fault::Hang => std::thread::sleep(Duration::from_secs(600)),
            Fault::Instead(bytes) | Fault::Refused(bytes) => client.write_all(&bytes)?,
            Fault::Byte(place, value) => {
                answer[place] = value;
                client.write_all(&answer)?;
            }
        }
        client.flush()?;
        request = message(&mut client)?;
    }
}

/// What becomes of the next answer.
fn next(fault: &mut Fault) -> Fault {
    match fault {
        Fault::CutAfter(left) if *left > 0 => {
            *left -= 1;
            Fault::None
        }
        Fault::LateOnce(pause) => {
            let late = Fault::Late(*pause);
            *fault = Fault::None;
            late
        }
        Fault::CutOnce => std::mem::replace(fault, Fault::None),
        fault => fault.clone(),
    }
}

/// One message: a header of eight bytes, the last four of which say how many follow.
fn message(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut message = vec![0; 8];
    stream.read_exact(&mut message)?;
    let length = u32::from_be_bytes(message[4..].try_into().unwrap()) as usize;
    message.resize(8 + length, 0);
    stream.read_exact(&mut message[8..])?;
    Ok(message)
}

/// The operation of a request: the value of the item with the tag 0x42005c.
fn operation(request: &[u8]) -> u8 {
    last_byte(request, [0x42, 0, 0x5c, 5])
}

/// The version of a request: the values of the items with the tags 0x42006a and 0x42006b.
fn version(request: &[u8]) -> (u8, u8) {
    (last_byte(request, [0x42, 0, 0x6a, 2]), last_byte(request, [0x42, 0, 0x6b, 2]))
}

/// The last byte of the first value of 32 bits that has this tag and type.
fn last_byte(request: &[u8], header: [u8; 4]) -> u8 {
    let place = request.windows(4).position(|bytes| bytes == header).unwrap();
    request[place + 11]
}
