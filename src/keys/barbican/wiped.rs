//! Connections whose memory is wiped when they end: requests and answers with keys in them pass through it.

use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport};
use zeroize::Zeroize;

/// The last link of a chain of connectors.
#[derive(Debug)]
pub struct Wiping;

impl<In: Transport> Connector<In> for Wiping {
    type Out = Wiped<In>;

    fn connect(&self, _: &ConnectionDetails, chained: Option<In>) -> Result<Option<Wiped<In>>, ureq::Error> {
        Ok(chained.map(Wiped))
    }
}

/// A connection of another kind.
#[derive(Debug)]
pub struct Wiped<T: Transport>(T);

impl<T: Transport> Transport for Wiped<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.0.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.0.transmit_output(amount, timeout)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.0.await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        self.0.is_open()
    }

    fn is_tls(&self) -> bool {
        self.0.is_tls()
    }
}

impl<T: Transport> Drop for Wiped<T> {
    fn drop(&mut self) {
        let buffers = self.0.buffers();
        // What has been used up is free again and is the first part of the rest.
        let unread = buffers.input().len();
        buffers.input_consume(unread);
        let (input, output) = buffers.tmp_and_output();
        input.zeroize();
        output.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use ureq::unversioned::transport::LazyBuffers;

    use super::*;

    /// Notes at its end whether its memory is wiped.
    #[derive(Debug)]
    struct Probe(LazyBuffers, Arc<AtomicBool>);

    impl Transport for Probe {
        fn buffers(&mut self) -> &mut dyn Buffers {
            &mut self.0
        }

        fn transmit_output(&mut self, _: usize, _: NextTimeout) -> Result<(), ureq::Error> {
            Ok(())
        }

        fn await_input(&mut self, _: NextTimeout) -> Result<bool, ureq::Error> {
            Ok(false)
        }

        fn is_open(&mut self) -> bool {
            true
        }
    }

    impl Drop for Probe {
        fn drop(&mut self) {
            let (input, output) = self.0.tmp_and_output();
            let is_wiped = input.len() >= 20_000 && input.iter().chain(output.iter()).all(|&byte| byte == 0);
            self.1.store(is_wiped, Ordering::Relaxed);
        }
    }

    #[test]
    fn what_went_through_is_wiped() {
        for read in [0, 30, 20_000] {
            let is_wiped = Arc::new(AtomicBool::new(false));
            let mut connection = Wiped(Probe(LazyBuffers::new(20_000, 10_000), Arc::clone(&is_wiped)));
            let buffers = connection.buffers();
            buffers.output().fill(7);
            buffers.input_append_buf().fill(7);
            buffers.input_appended(20_000);
            buffers.input_consume(read);
            drop(connection);
            assert!(is_wiped.load(Ordering::Relaxed), "{read}");
        }
    }
}
