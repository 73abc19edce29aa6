//! What connects to the control socket, any bytes in any pieces: a request or none, and what a request holds is
//! read as the daemon reads it.

#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use volcrypt::domain::Domain;
use volcrypt::protocol::{Request, receive_request};

#[derive(Arbitrary, Debug)]
enum Message<'a> {
    Bytes(&'a [u8]),
    /// What the hook sends, so that its XML is reached.
    Hook {
        operation: &'a str,
        domain: &'a str,
        xml: &'a str,
    },
    Xml(Vec<Element>),
    /// A request about one volume.
    Volume {
        request: u8,
        id: &'a str,
        text: &'a str,
    },
}

/// A piece of a domain's XML.
#[derive(Arbitrary, Debug)]
struct Element(u8);

const XML: [&str; 32] = [
    "<domain>",
    "<domain type='kvm'>",
    "</domain>",
    "<devices>",
    "</devices>",
    "<disk type='block' device='disk'>",
    "</disk>",
    "<source dev='/dev/sda'/>",
    "<source file='/x'/>",
    "<source protocol='iscsi' name='iqn.a:b/1'/>",
    "<source xmlns:a='b' a:dev='/dev/sda'/>",
    "<target dev='sda'/>",
    "<target dev='&#10;&#x9b;'/>",
    "<name>",
    "</name>",
    "<uuid>0b1f7c1e-1111-4222-8333-444455556666</uuid>",
    "<metadata>",
    "</metadata>",
    "<emulator>/usr/bin/x</emulator>",
    "<owner xmlns='https://volcrypt.org/xmlns/libvirt/owner/1'>p</owner>",
    "<!DOCTYPE a [<!ENTITY b 'c'>]>",
    "&b;",
    "<![CDATA[x]]>",
    "<!-- x -->",
    "&#0;",
    "&amp;",
    "\0",
    "\n",
    "..",
    "<hostdev>",
    "</hostdev>",
    "\u{feff}",
];

fn json(text: &str) -> String {
    serde_json::to_string(text).expect("a text")
}

impl Message<'_> {
    fn bytes(&self) -> Vec<u8> {
        let hook = |operation: &str, domain: &str, xml: &str| {
            format!(
                "{{\"hook\":{{\"operation\":{},\"domain\":{},\"xml\":{}}}}}\n",
                json(operation),
                json(domain),
                json(xml)
            )
        };
        match self {
            Message::Bytes(bytes) => bytes.to_vec(),
            Message::Hook { operation, domain, xml } => hook(operation, domain, xml).into_bytes(),
            Message::Xml(elements) => {
                let elements = elements.iter().take(500);
                let xml: String = elements.map(|element| XML[usize::from(element.0) % XML.len()]).collect();
                hook("prepare", "vm", &xml).into_bytes()
            }
            Message::Volume { request, id, text } => {
                let (id, text) = (json(id), json(text));
                let request = match request % 6 {
                    0 => format!("{{\"volume\":{{\"id\":{id}}}}}"),
                    1 => format!("{{\"enrol\":{{\"device\":{text},\"owner\":{id}}}}}"),
                    2 => format!("{{\"set-owner\":{{\"id\":{id},\"owner\":{text}}}}}"),
                    3 => format!("{{\"revoke\":{{\"volume\":{id},\"domain\":{text}}}}}"),
                    4 => format!(
                        "{{\"grant\":{{\"grant\":{{\"volume\":{id},\"domain\":{text},\"expires_at\":1,\"created_at\":0}}}}}}"
                    ),
                    _ => format!("{{\"audit\":{{\"volume\":{id},\"kind\":{text}}}}}"),
                };
                (request + "\n").into_bytes()
            }
        }
    }
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    message: Message<'a>,
    piece: u16,
}

fuzz_target!(|input: Input<'_>| {
    let bytes = input.message.bytes();
    let (mut client, server) = UnixStream::pair().expect("sockets");
    // All of it has to find room in the socket: nobody reads meanwhile.
    for piece in bytes.chunks(usize::from(input.piece).max(1024)) {
        client.write_all(piece).expect("room in the socket");
    }
    client.shutdown(Shutdown::Write).expect("an open socket");
    let Ok((message, None)) = receive_request(&server) else { return };
    let Ok(request) = serde_json::from_slice::<Request>(&message) else { return };
    if let Request::Hook { xml, .. } = &request
        && let Ok(domain) = Domain::parse(xml)
    {
        assert_eq!(domain.facts().name, domain.name);
    }
    // What was understood is what is said.
    let said = serde_json::to_string(&request).expect("a request");
    let again: Request = serde_json::from_str(&said).expect("its own request");
    assert_eq!(serde_json::to_string(&again).expect("a request"), said);
});
