use proptest::prelude::*;

use super::*;

/// A page with these designators, each as code set, association and type, and value.
fn page(designators: &[(u8, u8, &[u8])]) -> Vec<u8> {
    let body: Vec<u8> = designators
        .iter()
        .flat_map(|(code_set, kind, value)| [&[*code_set, *kind, 0, value.len() as u8], *value].concat())
        .collect();
    [&[0, 0x83], (body.len() as u16).to_be_bytes().as_slice(), &body].concat()
}

fn one(code_set: u8, kind: u8, value: &[u8]) -> Designator {
    let designators = designators(&page(&[(code_set, kind, value)])).unwrap();
    assert_eq!(designators.len(), 1);
    designators.into_iter().next().unwrap()
}

#[test]
fn every_form_is_told_in_the_kernels_notation() {
    let naa = *b"\x60\x01\x40\x56\xe9\xa9\x19\xcf\x79\xf6\x55\x65\x9b\xba\xa0\x8c";
    for (code_set, kind, value, expected_kind, expected) in [
        (1, 3, naa.as_slice(), DesignatorKind::Naa, "naa.60014056e9a919cf79f655659bbaa08c"),
        (1, 3, b"\x50\x01\x02\x03\x04\x05\x06\x07", DesignatorKind::Naa, "naa.5001020304050607"),
        (1, 2, b"\x00\x25\x38\x5b\x71\xb0\x09\x1c", DesignatorKind::Eui64, "eui.0025385b71b0091c"),
        (2, 1, b"LIO-ORG FILEIO:6e9a\0", DesignatorKind::T10Vendor, "t10.LIO-ORG FILEIO:6e9a"),
        (3, 8, b"iqn.2026-11.org.lab:v0,t,0x0001\0", DesignatorKind::Name, "iqn.2026-11.org.lab:v0,t,0x0001"),
        (1, 4, b"\0\0\0\x01", DesignatorKind::Other, "00000001"),
    ] {
        let found = one(code_set, kind, value);
        assert_eq!((found.kind, found.value.as_str()), (expected_kind, expected));
        assert_eq!(found.identifies_volume(), expected_kind != DesignatorKind::Other);
    }
}

#[test]
fn only_the_logical_units_own_designators_identify_it() {
    let naa = b"\x50\x01\x02\x03\x04\x05\x06\x07";
    for (bits, association) in
        [(0x10, Association::TargetPort), (0x20, Association::TargetDevice), (0x30, Association::Reserved)]
    {
        let found = one(1, bits | 3, naa);
        assert_eq!((found.association, found.kind), (association, DesignatorKind::Naa));
        assert!(!found.identifies_volume());
    }
    // The bit that says that the protocol's number counts has no say in it.
    assert!(one(0x51, 0x83, naa).identifies_volume());
}

#[test]
fn a_form_that_is_not_as_the_standard_has_it_identifies_nothing() {
    for (code_set, kind, value) in [
        (2, 3, b"\x50\x01\x02\x03\x04\x05\x06\x07".as_slice()),
        (1, 3, b"\x60\x01\x02\x03\x04\x05\x06\x07"),
        (1, 3, b"\x90\x01\x02\x03\x04\x05\x06\x07"),
        (1, 3, b""),
        (1, 2, b"\0\0\0"),
        (2, 1, b"LIO-ORG "),
        (3, 8, b"a name of its own"),
        (1, 0xf, b"x"),
    ] {
        assert!(!one(code_set, kind, value).identifies_volume(), "{kind} {value:?}");
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let whole = page(&[(1, 3, b"\x50\x01\x02\x03\x04\x05\x06\x07")]);
    for end in 0..whole.len() {
        assert!(designators(&whole[..end]).is_err(), "{end}");
    }
    assert!(designators(&[&whole[..], b"\0"].concat()).is_err());
    let mut reaching_out = whole.clone();
    reaching_out[7] += 1;
    assert_eq!(
        designators(&reaching_out).unwrap_err().to_string(),
        "VPD page 0x83 is cut off in the designator at byte 4"
    );
    assert!(designators(&[&[0, 0x80], &whole[2..]].concat()).is_err());
    assert_eq!(designators(&page(&[])), Ok(Vec::new()));
}

#[test]
fn a_serial_number_is_taken_without_its_padding() {
    assert_eq!(unit_serial(b"\0\x80\0\x08 a b \0 \0"), Ok(Some("a b".to_owned())));
    assert_eq!(unit_serial(b"\0\x80\0\x04   \0"), Ok(None));
    assert_eq!(unit_serial(b"\0\x80\0\x02a\xff"), Ok(Some(r"a\xff".to_owned())));
    assert!(unit_serial(b"\0\x80\0\x03ab").is_err() && unit_serial(b"\0\x83\0\0").is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = unit_serial(&bytes);
        let _ = designators(&bytes);
        let framed = [&[0, 0x83], (bytes.len() as u16).to_be_bytes().as_slice(), &bytes].concat();
        if let Ok(designators) = designators(&framed) {
            // None is made of bytes that are not there.
            prop_assert!(designators.len() * DESIGNATOR_HEADER <= bytes.len());
        }
    }

    #[test]
    fn what_was_written_is_read(values in prop::collection::vec((0u8..4, any::<u8>(), prop::collection::vec(any::<u8>(), 0..40)), 0..20)) {
        let written: Vec<(u8, u8, &[u8])> = values.iter().map(|(set, kind, value)| (*set, *kind, value.as_slice())).collect();
        let read = designators(&page(&written)).unwrap();
        prop_assert_eq!(read.len(), values.len());
        for (designator, (_, kind, _)) in read.iter().zip(&values) {
            prop_assert_eq!(designator.association == Association::LogicalUnit, kind >> 4 & 0b11 == 0);
        }
    }
}
