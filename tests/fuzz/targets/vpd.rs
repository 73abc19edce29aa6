//! The VPD pages of a storage server, any bytes: read or refused, and never read past their end.

#![no_main]

use libfuzzer_sys::fuzz_target;
use volcrypt::volume::vpd::{designators, unit_serial};

fuzz_target!(|bytes: &[u8]| {
    let _ = designators(bytes);
    let _ = unit_serial(bytes);
    // Most inputs have a wrong length in their header; with the right one they get further.
    let Ok(length) = u16::try_from(bytes.len()) else { return };
    let page = |code: u8| [&[0, code], length.to_be_bytes().as_slice(), bytes].concat();
    if let Ok(designators) = designators(&page(0x83)) {
        assert!(designators.len() * 4 <= bytes.len());
    }
    unit_serial(&page(0x80)).expect("a page of the right length is read");
});
