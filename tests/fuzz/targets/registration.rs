//! What connects to the wrapper's socket, any bytes with any descriptors: no listener comes of it, and no
//! descriptor stays open.

#![no_main]

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use volcrypt::protocol::registration::{HELLO, take_over};

#[derive(Arbitrary, Debug)]
struct Message<'a> {
    greets: bool,
    bytes: &'a [u8],
    descriptors: Vec<Descriptor>,
    /// How many of the descriptors come with a message of their own before.
    earlier: u8,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Descriptor {
    Null,
    Socket,
    Pipe,
}

/// The most descriptors that are sent: more than the daemon has room for.
const MOST: usize = 6;

static NULL: LazyLock<File> = LazyLock::new(|| File::open("/dev/null").expect("/dev/null"));
static SOCKET: LazyLock<(UnixStream, UnixStream)> = LazyLock::new(|| UnixStream::pair().expect("a socket"));
static PIPE: LazyLock<(OwnedFd, OwnedFd)> = LazyLock::new(|| rustix::pipe::pipe().expect("a pipe"));

fn send(client: &UnixStream, bytes: &[u8], descriptors: &[Descriptor]) {
    let descriptors: Vec<_> = descriptors
        .iter()
        .map(|descriptor| match descriptor {
            Descriptor::Null => NULL.as_fd(),
            Descriptor::Socket => SOCKET.0.as_fd(),
            Descriptor::Pipe => PIPE.0.as_fd(),
        })
        .collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    rustix::net::sendmsg(client, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).expect("a message");
}

/// The number that the next descriptor gets.
fn next_number() -> i32 {
    rustix::io::dup(&*NULL).expect("a descriptor").as_raw_fd()
}

fuzz_target!(|message: Message<'_>| {
    LazyLock::force(&SOCKET);
    LazyLock::force(&PIPE);
    let before = next_number();
    {
        let (client, server) = UnixStream::pair().expect("sockets");
        let descriptors = &message.descriptors[..message.descriptors.len().min(MOST)];
        let (earlier, later) = descriptors.split_at(usize::from(message.earlier) % (descriptors.len() + 1));
        let bytes = if message.greets { [&[HELLO], message.bytes].concat() } else { message.bytes.to_vec() };
        let (first, rest) = bytes.split_at(bytes.len().min(1));
        if !first.is_empty() {
            send(&client, first, earlier);
        }
        if !rest.is_empty() {
            send(&client, rest, later);
        }
        drop(client);
        take_over(&server).expect_err("none of the descriptors is a listener");
    }
    assert_eq!(next_number(), before, "a descriptor is left open");
});
