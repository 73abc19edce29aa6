use std::convert::Infallible;
use std::io;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::fs::inotify;
use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

use super::Guard;
use super::uevent::{Subject, was_asked_for};
use crate::volume::DeviceNumber;

/// The multicast group of the kernel's own announcements; udev's are in another.
const KERNELS_GROUP: u32 = 1;
/// Longer than any announcement (`UEVENT_BUFFER_SIZE` is 2048, and a path comes before it).
const MESSAGE_LIMIT: usize = 8192;
/// How often it is looked whether the guard is still on, should nothing have been announced.
const INTERVAL: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
/// How long to wait before the announcements are asked for again after an error.
const PAUSE: Duration = Duration::from_secs(1);

/// Keeps `guard` up to date for ever. `announced` hears of every block device that the kernel has something to say of,
/// once it is guarded; it must not wait for anything.
pub fn watch(guard: &Guard, announced: &dyn Fn(DeviceNumber)) -> ! {
    loop {
        match follow(guard, announced) {
            Ok(never) => match never {},
            Err(error) => tracing::error!("new devices are guarded with a delay only: {error}"),
        }
        std::thread::sleep(PAUSE);
    }
}

fn follow(guard: &Guard, announced: &dyn Fn(DeviceNumber)) -> io::Result<Infallible> {
    let announcements = uevents()?;
    let folders = new_folders(guard);
    // What was announced before the socket was there.
    guard.refresh();
    loop {
        let mut waiting = vec![PollFd::new(&announcements, PollFlags::IN)];
        waiting.extend(folders.iter().map(|folders| PollFd::new(folders, PollFlags::IN)));
        match rustix::event::poll(&mut waiting, Some(&INTERVAL)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        // That a folder was made is all that counts.
        let mut events = [0; 4096];
        while folders.as_ref().is_some_and(|folders| rustix::io::read(folders, &mut events).is_ok()) {}
        guard.ensure();
        take_announcements(guard, &announcements, announced)?;
    }
}

fn take_announcements(guard: &Guard, socket: &OwnedFd, announced: &dyn Fn(DeviceNumber)) -> io::Result<()> {
    let mut buffer = [0; MESSAGE_LIMIT];
    loop {
        match rustix::net::recv(socket, &mut buffer, RecvFlags::DONTWAIT) {
            Ok((received, _)) => {
                if let Some(subject) = Subject::of_message(&buffer[..received]) {
                    guard.look(&subject);
                    if let Subject::Block(number) = subject
                        && !was_asked_for(&buffer[..received])
                    {
                        announced(number);
                    }
                }
            }
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::INTR) => {}
            // More was announced than the socket holds.
            Err(Errno::NOBUFS) => guard.refresh(),
            Err(error) => return Err(error.into()),
        }
    }
}

fn uevents() -> io::Result<OwnedFd> {
    let kind = SocketType::DGRAM;
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, kind, SocketFlags::CLOEXEC, Some(KOBJECT_UEVENT))?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, KERNELS_GROUP))?;
    Ok(socket)
}

/// Tells when the guests' cgroup may have been made. Without it that is noticed a little later.
fn new_folders(guard: &Guard) -> Option<OwnedFd> {
    let folders = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).ok()?;
    inotify::add_watch(&folders, guard.cgroup().parent()?, inotify::WatchFlags::CREATE).ok()?;
    Some(folders)
}
