use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::super::control::Control;
use super::super::guests::Guests;
use super::*;
use crate::protocol::{Reply, Request, Response};

/// What the control socket of a daemon with `broker` says to `request`.
fn answer(broker: Broker, request: &[u8]) -> Response {
    let control = Control::new(Arc::new(broker), Arc::new(Guests::new().unwrap()));
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
fn a_withdrawn_volume_keeps_its_key() {
    let world = World::new();
    let device = world.add_volume("one", 31);
    let broker = world.broker(false);
    broker.enrol(device).unwrap();
    let id = || "one".parse().unwrap();
    assert!(matches!(ask(broker, &Request::Withdraw { id: id() }), Ok(Reply::Volumes(volumes)) if volumes.len() == 1));
    assert!(ask(world.broker(false), &Request::Withdraw { id: id() }).is_err());
    let Ok(Reply::Keys(keys)) = ask(world.broker(false), &Request::Keys) else { panic!() };
    assert_eq!((keys.len(), keys[0].destroyed), (1, false));
}

#[test]
fn a_mapped_volume_is_not_withdrawn() {
    let mut world = World::new();
    let device = world.add_volume("one", 32);
    world.broker(false).enrol(device).unwrap();
    world.mapped = true;
    let (sentence, _) = ask(world.broker(false), &Request::Withdraw { id: "one".parse().unwrap() }).unwrap_err();
    assert!(sentence.contains("in use on this host"), "{sentence}");
}

#[test]
fn the_status_says_what_is_wrong_with_the_configuration() {
    let Ok(Reply::Status(status)) = ask(World::new().broker_with("nonsense"), &Request::Status) else { panic!() };
    assert!(status.configuration_error.unwrap().starts_with("volcrypt.toml:1:"));
}
