//! How far a long look through a key manager is, told to whoever waits for it.

use std::cell::RefCell;

/// Is told how much is done, and how much there is.
type Listener = Box<dyn FnMut(u64, u64)>;

thread_local! {
    static LISTENER: RefCell<Option<Listener>> = const { RefCell::new(None) };
}

/// Does `work`, and has `listener` told how far it is, as long as this thread works on it.
pub fn telling<R>(listener: impl FnMut(u64, u64) + 'static, work: impl FnOnce() -> R) -> R {
    let _restore = Restore(LISTENER.replace(Some(Box::new(listener))));
    work()
}

/// `done` of `total` keys were looked at.
pub fn tell(done: usize, total: usize) {
    // While it listens it is not there to be told more.
    let listener = LISTENER.take();
    if let Some(mut listener) = listener {
        listener(done as u64, total as u64);
        LISTENER.set(Some(listener));
    }
}

/// Ends the telling, also when the work panicked.
struct Restore(Option<Listener>);

impl Drop for Restore {
    fn drop(&mut self) {
        LISTENER.set(self.0.take());
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    #[test]
    fn who_waits_is_told_as_long_as_the_work_takes() {
        let told = Rc::new(RefCell::new(Vec::new()));
        let listener = Rc::clone(&told);
        let done = telling(
            move |done, total| listener.borrow_mut().push((done, total)),
            || {
                tell(1, 3);
                tell(3, 3);
                7
            },
        );
        tell(9, 9);
        assert_eq!((done, told.take()), (7, vec![(1, 3), (3, 3)]));
    }
}
