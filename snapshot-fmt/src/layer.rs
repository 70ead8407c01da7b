//! A layer: pages of a linear space, each with its hash, and where they belong.
//!
//! Guest memory is such a space (its ranges one behind the other, in ascending order), and so is a disk. A layer says nothing about most pages: those
//! are its parent's, and where no layer has a page it is zero. The file, all of it little endian:
//!
//! | part | bytes |
//! | --- | --- |
//! | header page | 4096: the header, then zeros |
//! | stored pages, in ascending order of their number | 4096 each |
//! | extents: first page (8), pages (4), kind (4) | 16 each |
//! | tags: the hash of each block of hashes | 16 each |
//! | hashes of the stored pages, 256 to a block | 16 each |
//!
//! Stored pages lie as they are, at multiples of 4096: they can be mapped. The header's numbers are the pages of the
//! space, the stored pages, the pages that are zero, and the extents; the body's digest is that of extents and tags. So
//! opening reads those alone, and a block of hashes is read and checked when a page of it is.
//!
//! A layer in memory, which processes of one user hand to each other and nobody keeps, has no hashes and no tags: what is in it is taken as it is.

mod hashes;
mod index;
mod writer;

use std::fs::File;
use std::path::Path;

pub use index::{Extent, ExtentKind};
pub use writer::{LayerSummary, LayerWriter};

use crate::digest::{Digest, PageHash};
use crate::error::FormatError;
use crate::file::NamedFile;
use crate::header::{HEADER_LEN, Header, Kind};
use crate::{PAGE_BYTES, PAGE_SIZE, PAGES_MAX, Page, as_usize, pages};
use hashes::Hashes;

/// Most extents of a layer: their index has 256 MiB then.
pub const EXTENTS_MAX: u64 = 1 << 24;

/// The part of a layer file that says how long the others are.
#[derive(Debug, Clone, Copy)]
struct Shape {
    total_pages: u64,
    data_pages: u64,
    zero_pages: u64,
    extents: u64,
    hashed: bool,
}

impl Shape {
    /// Takes the header's numbers. They are bounded, so nothing that is computed from them overflows.
    fn new(file: &NamedFile, header: &Header) -> Result<Self, FormatError> {
        let [total, data, zero, extents, ..] = header.numbers;
        let at = Header::number_at;
        let total_pages = file.within(total, PAGES_MAX, at(0), "the number of pages")?;
        Ok(Self {
            total_pages,
            data_pages: file.within(data, total_pages, at(1), "the number of stored pages")?,
            zero_pages: file.within(zero, total_pages, at(2), "the number of zero pages")?,
            extents: file.within(
                extents,
                EXTENTS_MAX.min(total_pages),
                at(3),
                "the number of extents",
            )?,
            hashed: header.kind == Kind::Layer,
        })
    }

    fn extents_at(&self) -> u64 {
        offset_of_stored(self.data_pages)
    }

    fn tags_at(&self) -> u64 {
        self.extents_at() + self.extents * index::EXTENT_BYTES
    }

    fn hashes_at(&self) -> u64 {
        self.tags_at() + hashes::tags_len(self.hashed_pages())
    }

    fn end(&self) -> u64 {
        self.hashes_at() + hashes::hashes_len(self.hashed_pages())
    }

    fn hashed_pages(&self) -> u64 {
        if self.hashed { self.data_pages } else { 0 }
    }
}

/// Where the stored page `index` lies, in bytes.
pub fn offset_of_stored(index: u64) -> u64 {
    PAGE_BYTES * (index + 1)
}

/// A layer that is open: its index has been read and checked, its pages are when they are read.
#[derive(Debug)]
pub struct Layer {
    file: NamedFile,
    digest: Digest,
    shape: Shape,
    extents: Vec<Extent>,
    /// None of a layer in memory.
    hashes: Option<Hashes>,
}

impl Layer {
    /// Opens a layer; `path` names it in messages. Whoever knows which layer it must be compares [`Layer::digest`].
    pub fn open(file: File, path: &Path) -> Result<Self, FormatError> {
        let file = NamedFile::new(file, path, Kind::Layer.name())?;
        let header = Header::read(&file, Kind::Layer)?;
        Self::of(file, &header)
    }

    /// Opens a layer that comes from another process of this user, which may be one in memory.
    pub fn open_handed(file: File, path: &Path) -> Result<Self, FormatError> {
        let file = NamedFile::new(file, path, Kind::Layer.name())?;
        let header = Header::read(&file, Kind::LayerInMemory)
            .or_else(|_| Header::read(&file, Kind::Layer))?;
        Self::of(file, &header)
    }

    fn of(file: NamedFile, header: &Header) -> Result<Self, FormatError> {
        let shape = Shape::new(&file, header)?;
        check_padding(&file)?;
        file.holds(
            PAGE_BYTES,
            shape.extents_at() - PAGE_BYTES,
            "the stored pages",
        )?;
        file.holds(
            shape.extents_at(),
            shape.hashes_at() - shape.extents_at(),
            "the index",
        )?;
        file.holds(
            shape.hashes_at(),
            shape.end() - shape.hashes_at(),
            "the hashes",
        )?;
        file.ends_at(shape.end())?;
        let index_at = shape.extents_at();
        let index = file.read_vec(index_at, shape.hashes_at() - index_at, "the index")?;
        if Digest::of(&index) != header.body {
            return Err(file.corrupt(
                index_at,
                "the index does not have the digest that the header gives",
            ));
        }
        let (extents, tags) =
            index.split_at(index.len() - as_usize(hashes::tags_len(shape.hashed_pages())));
        let extents = index::parse(&file, &shape, extents)?;
        let hashes = || Hashes::new(tags, shape.data_pages, shape.hashes_at());
        let hashes = shape.hashed.then(hashes);
        Ok(Self {
            file,
            digest: header.digest(),
            shape,
            extents,
            hashes,
        })
    }

    /// The digest of the file, which stands for all of its content; of a layer in memory, which has no hashes, for its header and index alone.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Length of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.file.len()
    }

    /// The file, for mapping: stored page `i` lies at [`offset_of_stored`]`(i)`.
    pub fn file(&self) -> &File {
        self.file.file()
    }

    /// What messages call the file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Pages of the space.
    pub fn total_pages(&self) -> u64 {
        self.shape.total_pages
    }

    /// Pages that are stored.
    pub fn data_pages(&self) -> u64 {
        self.shape.data_pages
    }

    /// Pages that are zero here, whatever the parent has.
    pub fn zero_pages(&self) -> u64 {
        self.shape.zero_pages
    }

    /// What the layer has, in ascending order.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// What the layer has at `page`; `None` where that is the parent's.
    pub fn lookup(&self, page: u64) -> Option<ExtentKind> {
        let index = self
            .extents
            .partition_point(|extent| extent.first_page <= page);
        let extent = self.extents.get(index.checked_sub(1)?)?;
        (page < extent.end()).then(|| match extent.kind {
            ExtentKind::Zero => ExtentKind::Zero,
            ExtentKind::Data { first_stored } => ExtentKind::Data {
                first_stored: first_stored + (page - extent.first_page),
            },
        })
    }

    /// The hash of the stored page `index`, which must be below [`Layer::data_pages`].
    pub fn hash_of(&self, index: u64) -> Result<PageHash, FormatError> {
        if let Some(hashes) = &self.hashes {
            return hashes.get(&self.file, index);
        }
        let mut bytes = [0; PAGE_SIZE];
        self.file
            .read(&mut bytes, offset_of_stored(index), "a page")?;
        Ok(PageHash::of(&bytes))
    }

    /// Reads the stored page `index` and checks it. `page` is its number in the space, for messages.
    pub fn read_stored(&self, index: u64, page: u64, bytes: &mut Page) -> Result<(), FormatError> {
        let offset = offset_of_stored(index);
        self.file.read(bytes, offset, "a page")?;
        self.check_stored(index, page, bytes)
    }

    /// Checks the bytes of the stored page `index` that were got by another way, such as a mapping.
    pub fn check_stored(&self, index: u64, page: u64, bytes: &Page) -> Result<(), FormatError> {
        let Some(hashes) = &self.hashes else {
            return Ok(());
        };
        let hash = hashes.get(&self.file, index)?;
        self.check(&hash, index, page, bytes)
    }

    /// Reads as many stored pages from `index` on as `bytes` has room for, and checks each. `first_page` is the number of the
    /// first in the space, for messages.
    pub fn read_stored_run(
        &self,
        index: u64,
        first_page: u64,
        bytes: &mut [u8],
    ) -> Result<(), FormatError> {
        self.file.read(bytes, offset_of_stored(index), "pages")?;
        for (bytes, nth) in pages(bytes).zip(0..) {
            self.check_stored(index + nth, first_page + nth, bytes)?;
        }
        Ok(())
    }

    /// Reads what the layer has at `page`, and checks it. `false` where that is the parent's: `bytes` stay as they are.
    pub fn read_page(&self, page: u64, bytes: &mut Page) -> Result<bool, FormatError> {
        match self.lookup(page) {
            None => return Ok(false),
            Some(ExtentKind::Zero) => bytes.fill(0),
            Some(ExtentKind::Data { first_stored }) => {
                self.read_stored(first_stored, page, bytes)?
            }
        }
        Ok(true)
    }

    /// Reads every stored page and checks it.
    pub fn verify(&self) -> Result<(), FormatError> {
        const AT_ONCE: u64 = 64;
        let mut buffer = vec![0; PAGE_SIZE * as_usize(AT_ONCE)];
        for extent in &self.extents {
            let ExtentKind::Data { first_stored } = extent.kind else {
                continue;
            };
            for done in (0..extent.count).step_by(as_usize(AT_ONCE)) {
                let count = AT_ONCE.min(extent.count - done);
                let bytes = &mut buffer[..PAGE_SIZE * as_usize(count)];
                self.read_stored_run(first_stored + done, extent.first_page + done, bytes)?;
            }
        }
        Ok(())
    }

    fn check(
        &self,
        hash: &PageHash,
        index: u64,
        page: u64,
        bytes: &Page,
    ) -> Result<(), FormatError> {
        if PageHash::of(bytes) == *hash {
            return Ok(());
        }
        Err(FormatError::Page {
            file: self.path().to_owned(),
            page,
            offset: offset_of_stored(index),
        })
    }
}

/// Behind the header is nothing: a layer has one form.
fn check_padding(file: &NamedFile) -> Result<(), FormatError> {
    let mut padding = [0; PAGE_SIZE - HEADER_LEN];
    file.holds(HEADER_LEN as u64, padding.len() as u64, "the header page")?;
    file.read(&mut padding, HEADER_LEN as u64, "the header page")?;
    match padding.iter().position(|&byte| byte != 0) {
        None => Ok(()),
        Some(at) => Err(file.corrupt(
            (HEADER_LEN + at) as u64,
            "the header page is not zero behind the header",
        )),
    }
}
