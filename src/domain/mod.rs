//! A domain as libvirt describes it in XML: <https://libvirt.org/formatdomain.html>.

mod adoption;
mod facts;
mod given;
mod refusals;
mod rewrite;
mod splice;
mod xml;

pub use adoption::{Adoption, METADATA_NAMESPACE, Release, adopt, release};
pub use facts::{Facts, Nobody, Requester};
pub use given::Given;
#[cfg(test)]
pub use given::given;
pub use refusals::{in_disk, is_believed, is_hidden, passes_commands, reached_by_qemu};
pub use rewrite::{
    Judge, MAX_XML, OnMapping, Rewritten, lone_disk, rewrite, rewrite_device, sources_before, unrewrite,
};
pub use xml::{Disk, Domain, Image, InvalidXml, Layer, Source};

/// A domain's name as a word of the shell.
pub fn quoted(name: &str) -> String {
    match name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
        true => name.to_owned(),
        false => format!("'{}'", name.replace('\'', r"'\''")),
    }
}

/// Whether a text is a UUID as libvirt and OpenStack write it, in letters of either size.
pub fn is_uuid(text: &str) -> bool {
    let parts = text.split('-').map(|part| part.bytes().all(|byte| byte.is_ascii_hexdigit()).then_some(part.len()));
    parts.eq([Some(8), Some(4), Some(4), Some(4), Some(12)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_to_paste() {
        assert_eq!(quoted("web-1.a_b"), "web-1.a_b");
        assert_eq!(quoted("a b'; rm"), r"'a b'\''; rm'");
    }
}
