//! `volcrypt rewrite`, a filter.

use std::io::{self, Read};

use super::{CommandError, Daemon};
use crate::domain::{MAX_XML, unrewrite};
use crate::protocol::{Reply, Request};

/// The XML in `input` with every disk that the daemon knows as protected on its mapping.
pub(super) fn forward(daemon: &Daemon<'_>, input: impl Read) -> Result<String, CommandError> {
    match daemon.call(&Request::Rewrite { xml: read(input)? })? {
        Reply::Xml(xml) => Ok(xml),
        _ => Err(CommandError::UnexpectedReply),
    }
}

/// `xml`, a `<domain>`, as it was before, if the daemon finds that every disk gets its volume back.
pub(super) fn back(daemon: &Daemon<'_>, xml: String) -> Result<String, CommandError> {
    match daemon.call(&Request::Unrewrite { xml })? {
        Reply::Xml(xml) => Ok(xml),
        _ => Err(CommandError::UnexpectedReply),
    }
}

/// The XML in `input` as it was before, for which nobody has to be asked.
pub(super) fn reverse(input: impl Read) -> Result<String, CommandError> {
    unrewrite(&read(input)?).map_err(CommandError::Refused)
}

/// What is in `input`, which is to be XML.
pub(super) fn read(input: impl Read) -> Result<String, CommandError> {
    let mut bytes = Vec::new();
    input.take(MAX_XML as u64 + 1).read_to_end(&mut bytes).map_err(CommandError::Input)?;
    if bytes.len() > MAX_XML {
        return Err(CommandError::Input(io::Error::other(format!("it is longer than {MAX_XML} bytes"))));
    }
    String::from_utf8(bytes)
        .map_err(|_| CommandError::Input(io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;
    use std::thread;

    #[test]
    fn the_daemon_gets_every_byte_and_its_answer_is_the_output() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let daemon = thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            stream.write_all(b"{\"done\":{\"xml\":\"<disk\\r\\n/>\"}}\n").unwrap();
            line
        });
        // A longer text than goes through a socket at once.
        let xml = format!("\u{feff}<disk \"&é'\r\n\t/>{}", " ".repeat(1 << 20));
        assert_eq!(forward(&Daemon { socket: &socket }, xml.as_bytes()).unwrap(), "<disk\r\n/>");
        match serde_json::from_str(&daemon.join().unwrap()).unwrap() {
            Request::Rewrite { xml: sent } => assert_eq!(sent, xml),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_no_text_or_too_long_is_not_sent() {
        let daemon = Daemon { socket: "/nowhere".as_ref() };
        let sentence = |input: &[u8]| forward(&daemon, input).unwrap_err().to_string();
        assert_eq!(sentence(b"<disk\xff/>"), "standard input is not UTF-8: write the XML in UTF-8");
        // In the middle of a character.
        let long = "é".repeat(MAX_XML / 2 + 1);
        assert_eq!(
            sentence(long.as_bytes()),
            format!("standard input cannot be read (it is longer than {MAX_XML} bytes)")
        );
        assert_eq!(reverse(long.as_bytes()).unwrap_err().to_string(), sentence(long.as_bytes()));
    }
}
