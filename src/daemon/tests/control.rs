use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::super::control::Control;
use super::super::guests::Guests;
use super::*;
use crate::protocol::{GuardStatus, Reply, Request, Response};

/// What the control socket of a daemon with `broker` says to `request`.
fn answer(broker: Broker, request: &[u8]) -> Response {
    let control = Control::new(Arc::new(broker), Arc::new(Guests::new().unwrap()), Box::new(GuardStatus::default));
    let (mut client, server) = UnixStream::pair().unwrap();
    client.write_all(request).unwrap();
    client.write_all(b"\n").unwrap();
    control.converse(&server).expect("run the tests as root");
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

fn ask(broker: Broker, request: &Request) -> Result<Reply, (String, i32)> {
    match answer(broker, &serde_json::to_vec(request).unwrap()) {
        Response::Done(reply) => Ok(reply),
        Response::Refused { sentence, errno } => Err((sentence, errno)),
    }
}

#[test]
fn a_request_of_another_version_gets_a_sentence() {
    for request in ["", "{}", "\"fly\"", "{\"status\":{\"more\":1}}", "{\"volume\":{\"id\":\"../x\"}}", "[1", "\0"] {
        let Response::Refused { sentence, .. } = answer(World::new().broker(false), request.as_bytes()) else {
            panic!("{request:?} was carried out");
        };
        assert!(sentence.contains("systemctl restart volcryptd"), "{sentence}");
    }
}

#[test]
fn the_status_says_what_is_wrong_with_the_configuration() {
    let Ok(Reply::Status(status)) = ask(World::new().broker_with("nonsense"), &Request::Status) else { panic!() };
    assert!(status.configuration_error.unwrap().starts_with("volcrypt.toml:1:"));
}
