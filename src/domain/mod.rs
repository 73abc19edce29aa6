//! A domain as libvirt describes it in XML: <https://libvirt.org/formatdomain.html>.

mod facts;
mod xml;

pub use facts::{Facts, Nobody, Requester};
pub use xml::{Disk, Domain, InvalidXml, Source};

/// The namespace of what volcrypt reads and writes in a domain's `<metadata>`:
/// <https://libvirt.org/formatdomain.html#general-metadata>.
pub const NAMESPACE: &str = "https://volcrypt.org/xmlns/libvirt/1";
