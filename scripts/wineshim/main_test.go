package main

import (
	"bytes"
	"debug/pe"
	"encoding/binary"
	"testing"
)

// TestForwarder reads the file with the standard library, down to the forwarder.
func TestForwarder(t *testing.T) {
	b := forwarder("bcryptprimitives.dll", "ProcessPrng", "advapi32.SystemFunction036")
	if len(b) != 1024 {
		t.Errorf("got %d bytes, want 1024", len(b))
	}
	f, err := pe.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if f.Machine != pe.IMAGE_FILE_MACHINE_AMD64 || f.Characteristics&pe.IMAGE_FILE_DLL == 0 {
		t.Errorf("machine %#x, characteristics %#x: want a 64-bit DLL", f.Machine, f.Characteristics)
	}
	h := f.OptionalHeader.(*pe.OptionalHeader64)
	if h.AddressOfEntryPoint != 0 || h.SizeOfCode != 0 {
		t.Errorf("entry point %#x, %d bytes of code: want none", h.AddressOfEntryPoint, h.SizeOfCode)
	}
	s := f.Sections[0]
	data, err := s.Data()
	if err != nil {
		t.Fatal(err)
	}
	at := func(rva uint32) []byte { return data[rva-s.VirtualAddress:] }
	text := func(rva uint32) string { s, _, _ := bytes.Cut(at(rva), []byte{0}); return string(s) }
	where := h.DataDirectory[pe.IMAGE_DIRECTORY_ENTRY_EXPORT]
	var d exportDirectory
	if err := binary.Read(bytes.NewReader(at(where.VirtualAddress)), binary.LittleEndian, &d); err != nil {
		t.Fatal(err)
	}
	if got := text(d.Name); got != "bcryptprimitives.dll" || d.Names != 1 || d.Addresses != 1 {
		t.Errorf("directory of %q with %d names, %d addresses", got, d.Names, d.Addresses)
	}
	if got := text(binary.LittleEndian.Uint32(at(d.NameTable))); got != "ProcessPrng" {
		t.Errorf("exports %q", got)
	}
	to := binary.LittleEndian.Uint32(at(d.AddressTable))
	if got := text(to); got != "advapi32.SystemFunction036" {
		t.Errorf("leads to %q", got)
	}
	if to < where.VirtualAddress || to >= where.VirtualAddress+where.Size {
		t.Errorf("address %#x is outside the directory: it would be taken for code", to)
	}
}
