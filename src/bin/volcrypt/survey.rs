use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber, clear_error_callback};
use virt::sys;
use volcrypt::cli::doctor::{DomainView, LibvirtView};

/// libvirt's version and domains, over a connection that can change nothing.
pub fn survey() -> Result<LibvirtView, String> {
    // Otherwise libvirt writes every error to stderr itself.
    clear_error_callback();
    ask().map_err(|error| error.message().trim_end().to_owned())
}

fn ask() -> Result<LibvirtView, Error> {
    let connection = Connect::open_read_only(Some("qemu:///system"))?;
    let mut domains = Vec::new();
    for domain in connection.list_all_domains(0)? {
        match view(&domain) {
            Ok(view) => domains.push(view),
            // It went away since the list was made.
            Err(error) if error.code() == ErrorNumber::NoDomain => {}
            Err(error) => return Err(error),
        }
    }
    Ok(LibvirtView { version: connection.get_lib_version()?, domains })
}

fn view(domain: &Domain) -> Result<DomainView, Error> {
    let running = domain.is_active()?.then(|| domain.get_xml_desc(0)).transpose()?;
    let saved = domain.is_persistent()?.then(|| domain.get_xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)).transpose()?;
    Ok(DomainView { name: domain.get_name()?, running, saved })
}
