// Command wineshim writes bcryptprimitives.dll, which Go programs for Windows ask
// for random numbers and which Wine before 9 does not have: a DLL without code,
// whose one export is a forwarder to what advapi32.dll has. It is for a temporary
// Wine prefix of the tests, and no part of what people install.
//
//	wineshim PREFIX/drive_c/windows/system32/bcryptprimitives.dll
package main

import (
	"bytes"
	"debug/pe"
	"encoding/binary"
	"fmt"
	"os"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: wineshim FILE")
		os.Exit(2)
	}
	if err := os.WriteFile(os.Args[1], forwarder("bcryptprimitives.dll", "ProcessPrng", "advapi32.SystemFunction036"), 0o644); err != nil {
		fmt.Fprintln(os.Stderr, "wineshim:", err)
		os.Exit(1)
	}
}

// How the file is laid out: headers, then one section.
const (
	fileAlign    = 0x200
	sectionAlign = 0x1000
	peOffset     = 0x40 // behind the DOS header
	sectionRVA   = sectionAlign
)

// exportDirectory is IMAGE_EXPORT_DIRECTORY (PE format, "The .edata section").
type exportDirectory struct {
	Flags, Time                        uint32
	Major, Minor                       uint16
	Name, Base                         uint32
	Addresses, Names                   uint32 // how many
	AddressTable, NameTable, OrdinalAt uint32 // where
}

// forwarder is a 64-bit DLL that exports one name, as another DLL's function.
func forwarder(dll, export, to string) []byte {
	edata := section(dll, export, to)
	var b bytes.Buffer
	put := func(v any) { binary.Write(&b, binary.LittleEndian, v) }
	dos := make([]byte, peOffset)
	copy(dos, "MZ")
	binary.LittleEndian.PutUint32(dos[0x3c:], peOffset)
	b.Write(dos)
	b.WriteString("PE\x00\x00")
	optional := pe.OptionalHeader64{
		Magic: 0x20b, SizeOfInitializedData: fileAlign, ImageBase: 0x180000000,
		SectionAlignment: sectionAlign, FileAlignment: fileAlign,
		MajorOperatingSystemVersion: 6, MajorSubsystemVersion: 6,
		SizeOfImage: 2 * sectionAlign, SizeOfHeaders: fileAlign,
		Subsystem: pe.IMAGE_SUBSYSTEM_WINDOWS_CUI, DllCharacteristics: pe.IMAGE_DLLCHARACTERISTICS_NX_COMPAT,
		NumberOfRvaAndSizes: 16,
	}
	optional.DataDirectory[pe.IMAGE_DIRECTORY_ENTRY_EXPORT] = pe.DataDirectory{VirtualAddress: sectionRVA, Size: uint32(len(edata))}
	put(pe.FileHeader{
		Machine: pe.IMAGE_FILE_MACHINE_AMD64, NumberOfSections: 1, SizeOfOptionalHeader: uint16(binary.Size(optional)),
		Characteristics: pe.IMAGE_FILE_EXECUTABLE_IMAGE | pe.IMAGE_FILE_LARGE_ADDRESS_AWARE | pe.IMAGE_FILE_DLL,
	})
	put(optional)
	put(pe.SectionHeader32{
		Name: [8]uint8{'.', 'e', 'd', 'a', 't', 'a'}, VirtualSize: uint32(len(edata)), VirtualAddress: sectionRVA,
		SizeOfRawData: fileAlign, PointerToRawData: fileAlign,
		Characteristics: pe.IMAGE_SCN_CNT_INITIALIZED_DATA | pe.IMAGE_SCN_MEM_READ,
	})
	pad(&b, fileAlign)
	b.Write(edata)
	pad(&b, 2*fileAlign)
	return b.Bytes()
}

// section is the export directory, its three tables of one entry, and the texts.
// An address inside the section is not code but a forwarder's text.
func section(dll, export, to string) []byte {
	tables := uint32(sectionRVA + binary.Size(exportDirectory{}))
	texts := tables + 4 + 4 + 2
	nameAt, exportAt := texts, texts+uint32(len(dll))+1
	toAt := exportAt + uint32(len(export)) + 1
	var b bytes.Buffer
	put := func(v any) { binary.Write(&b, binary.LittleEndian, v) }
	put(exportDirectory{Name: nameAt, Base: 1, Addresses: 1, Names: 1, AddressTable: tables, NameTable: tables + 4, OrdinalAt: tables + 8})
	put([]uint32{toAt, exportAt})
	put(uint16(0))
	b.WriteString(dll + "\x00" + export + "\x00" + to + "\x00")
	return b.Bytes()
}

func pad(b *bytes.Buffer, to int) { b.Write(make([]byte, to-b.Len())) }
