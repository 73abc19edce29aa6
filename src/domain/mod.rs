//! A domain as libvirt describes it in XML: <https://libvirt.org/formatdomain.html>.

mod xml;

pub use xml::{Disk, Domain, InvalidXml, Source};
