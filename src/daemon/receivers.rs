use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many threads wait before one that comes back ends.
const ENOUGH: usize = 4;
/// How many threads there may be. As many guests as that, less one, can keep one of them each for good.
const MOST: usize = 256;
/// The size of a thread's stack in bytes. What is touched of it stays in memory, which is far less.
const STACK: usize = 128 << 10;

/// Threads that wait for the same thing, so that there is always one that waits, whatever holds the others
/// up. In the long run there are as many as were needed at the same time, and no thread is woken in vain.
#[derive(Debug, Default)]
pub struct Receivers {
    /// Those that wait, and those that were started and are about to.
    waiting: AtomicUsize,
    threads: AtomicUsize,
}

/// Whether anybody waits while a thread does something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relief {
    /// Somebody does.
    Waiting,
    /// Nobody does: there are too many threads, or the system gives no more.
    None,
}

impl Receivers {
    /// Starts a thread that waits. It runs `work`, which has to call [`Self::has_come`] whenever what it waited
    /// for has come, and has to end when [`Self::may_wait`] says so.
    ///
    /// # Errors
    /// When there are too many, or the system gives no more.
    pub fn start(&self, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        if self.threads.fetch_add(1, Ordering::SeqCst) >= MOST {
            self.threads.fetch_sub(1, Ordering::SeqCst);
            return Err(io::Error::other(format!("there are {MOST} already, and all are held up")));
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let thread = std::thread::Builder::new().name("receiver".to_owned()).stack_size(STACK).spawn(work);
        thread.map(drop).inspect_err(|_| {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            self.threads.fetch_sub(1, Ordering::SeqCst);
        })
    }

    /// Says that the calling thread waits no more. If nobody else does, `start` is called to start another.
    pub fn has_come(&self, start: impl FnOnce() -> io::Result<()>) -> Relief {
        if self.waiting.fetch_sub(1, Ordering::SeqCst) > 1 {
            return Relief::Waiting;
        }
        match start() {
            Ok(()) => Relief::Waiting,
            Err(error) => {
                tracing::error!("no other thread can wait for guests' calls: {error}");
                Relief::None
            }
        }
    }

    /// Says that the calling thread is free again. Whether it shall wait once more; otherwise it has to end.
    pub fn may_wait(&self) -> bool {
        let one_more = |waiting| (waiting < ENOUGH).then_some(waiting + 1);
        let waits = self.waiting.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).is_ok();
        if !waits {
            self.threads.fetch_sub(1, Ordering::SeqCst);
        }
        waits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn somebody_always_waits_and_not_too_many_do() {
        let receivers = Receivers::default();
        let start = || receivers.start(|| ());
        start().unwrap();
        // All are held up one after the other.
        for threads in 1..MOST {
            assert_eq!(receivers.has_come(start), Relief::Waiting);
            assert_eq!(receivers.waiting.load(Ordering::SeqCst), 1);
            assert_eq!(receivers.threads.load(Ordering::SeqCst), threads + 1);
        }
        assert_eq!(receivers.has_come(start), Relief::None);
        // And all come back.
        assert_eq!((0..MOST).filter(|_| receivers.may_wait()).count(), ENOUGH);
        assert_eq!(receivers.threads.load(Ordering::SeqCst), ENOUGH);
        // One that takes its turn while others wait starts nobody.
        assert_eq!(receivers.has_come(|| panic!("somebody waits")), Relief::Waiting);
        assert!(receivers.may_wait());
    }
}
