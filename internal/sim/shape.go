package sim

// kind is what a value of the VM's data may be.
type kind uint8

const (
	text   kind = iota // a string; numbers and truth values are written as strings
	flag               // true or false
	number             // a whole number
	object             // named fields
	list               // any number of elements
)

var kindNames = [...]string{"a single value", "true or false", "a whole number", "a mapping", "a list"}

func (k kind) String() string { return kindNames[k] }

// shape says what a part of the VM's data looks like and since which
// api-version the service shows it ("" means: as long as what it is in).
type shape struct {
	kind   kind
	since  string
	fields map[string]*shape // of an object
	elem   *shape            // of a list

	// A missing field is filled with its empty value, unless it is optional
	// (stays away) or required (an error).
	optional, required bool
}

type fields = map[string]*shape

func leaf() *shape            { return &shape{} }
func obj(f fields) *shape     { return &shape{kind: object, fields: f} }
func many(elem *shape) *shape { return &shape{kind: list, elem: elem} }

// must, may and from return a copy of the shape that is required, is optional,
// has a first api-version.
func must(s *shape) *shape                 { c := *s; c.required = true; return &c }
func may(s *shape) *shape                  { c := *s; c.optional = true; return &c }
func from(version string, s *shape) *shape { c := *s; c.since = version; return &c }

// prune returns the parts of v that the api-version knows. It copies what it
// changes, and never changes v. What has no shape, in a VM made by hand, stays.
func (s *shape) prune(v any, version string) any {
	if s == nil {
		return v
	}
	switch v := v.(type) {
	case map[string]any:
		out := make(map[string]any, len(v))
		for name, child := range v {
			if f := s.fields[name]; f == nil || f.since <= version {
				out[name] = f.prune(child, version)
			}
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = s.elem.prune(v[i], version)
		}
		return out
	default:
		return v
	}
}

// empty is the value of a field that is not given.
func (s *shape) empty() any {
	switch s.kind {
	case object:
		out := make(map[string]any)
		for name, f := range s.fields {
			if !f.optional {
				out[name] = f.empty()
			}
		}
		return out
	case list:
		return []any{}
	case flag:
		return false
	case number:
		return 0
	default:
		return ""
	}
}

// fileShape is the whole of an instance file.
var fileShape = obj(fields{
	"versions":        may(many(leaf())),
	"instance":        obj(fields{"compute": computeShape, "network": networkShape}),
	"extended":        may(extendedShape),
	"identity":        may(identityShape),
	"loadbalancer":    may(balancerShape),
	"reprovisiondata": may(leaf()),
})

var instanceShape = fileShape.fields["instance"]

// computeShape lists the fields of /metadata/instance/compute and the
// api-versions that brought them (docs/protocol-azure.md §1.6).
var computeShape = obj(fields{
	"additionalCapabilities":     from("2021-11-01", obj(fields{"hibernationEnabled": leaf()})),
	"azEnvironment":              from("2018-10-01", leaf()),
	"customData":                 from("2019-02-01", leaf()),
	"evictionPolicy":             from("2020-12-01", leaf()),
	"extendedLocation":           from("2021-03-01", obj(fields{"name": leaf(), "type": leaf()})),
	"host":                       from("2021-11-15", obj(fields{"id": leaf()})),
	"hostGroup":                  from("2021-11-15", obj(fields{"id": leaf()})),
	"isHostCompatibilityLayerVm": from("2020-06-01", leaf()),
	"licenseType":                from("2020-09-01", leaf()),
	"location":                   leaf(),
	"name":                       leaf(),
	"offer":                      leaf(),
	"osProfile": from("2020-07-15", obj(fields{
		"adminUsername":                 leaf(),
		"computerName":                  leaf(),
		"disablePasswordAuthentication": from("2020-10-01", leaf()),
	})),
	"osType":                 leaf(),
	"physicalZone":           from("2023-11-15", leaf()),
	"placementGroupId":       from("2017-08-01", leaf()),
	"plan":                   from("2018-04-02", obj(fields{"name": leaf(), "product": leaf(), "publisher": leaf()})),
	"platformFaultDomain":    leaf(),
	"platformSubFaultDomain": from("2021-10-01", leaf()),
	"platformUpdateDomain":   leaf(),
	"priority":               from("2020-12-01", leaf()),
	"provider":               from("2018-10-01", leaf()),
	"publicKeys":             from("2018-04-02", many(obj(fields{"keyData": leaf(), "path": leaf()}))),
	"publisher":              leaf(),
	"resourceGroupName":      from("2017-08-01", leaf()),
	"resourceId":             from("2019-03-11", leaf()),
	"securityProfile": from("2020-06-01", obj(fields{
		"encryptionAtHost":  from("2021-11-01", leaf()),
		"secureBootEnabled": leaf(),
		"securityType":      from("2021-12-13", leaf()),
		"virtualTpmEnabled": leaf(),
	})),
	"sku":                    leaf(),
	"storageProfile":         from("2019-06-01", storageShape),
	"subscriptionId":         from("2017-08-01", leaf()),
	"tags":                   from("2017-08-01", leaf()),
	"tagsList":               from("2019-06-04", many(obj(fields{"name": leaf(), "value": leaf()}))),
	"userData":               from("2021-01-01", leaf()),
	"version":                leaf(),
	"virtualMachineScaleSet": from("2021-03-01", obj(fields{"id": leaf()})),
	"vmId":                   leaf(),
	"vmScaleSetName":         from("2017-12-01", leaf()),
	"vmSize":                 leaf(),
	"zone":                   from("2017-12-01", leaf()),
})

var storageShape = obj(fields{
	"dataDisks": many(obj(fields{
		"bytesPerSecondThrottle":  from("2021-05-01", leaf()),
		"caching":                 leaf(),
		"createOption":            leaf(),
		"diffDiskSettings":        may(obj(fields{"option": leaf()})),
		"diskCapacityBytes":       from("2021-05-01", leaf()),
		"diskSizeGB":              leaf(),
		"encryptionSettings":      may(encryptionShape),
		"image":                   obj(fields{"uri": leaf()}),
		"isSharedDisk":            from("2021-05-01", leaf()),
		"isUltraDisk":             from("2021-05-01", leaf()),
		"lun":                     leaf(),
		"managedDisk":             obj(fields{"id": leaf(), "storageAccountType": leaf()}),
		"name":                    leaf(),
		"opsPerSecondThrottle":    from("2021-05-01", leaf()),
		"osType":                  may(leaf()),
		"vhd":                     obj(fields{"uri": leaf()}),
		"writeAcceleratorEnabled": leaf(),
	})),
	"imageReference": obj(fields{
		"communityGalleryImageId": from("2023-07-01", leaf()),
		"exactVersion":            from("2023-07-01", leaf()),
		"id":                      leaf(),
		"offer":                   leaf(),
		"publisher":               leaf(),
		"sharedGalleryImageId":    from("2023-07-01", leaf()),
		"sku":                     leaf(),
		"version":                 leaf(),
	}),
	"osDisk": obj(fields{
		"caching":                 leaf(),
		"createOption":            leaf(),
		"diffDiskSettings":        obj(fields{"option": leaf()}),
		"diskSizeGB":              leaf(),
		"encryptionSettings":      encryptionShape,
		"image":                   obj(fields{"uri": leaf()}),
		"managedDisk":             obj(fields{"id": leaf(), "storageAccountType": leaf()}),
		"name":                    leaf(),
		"osType":                  leaf(),
		"vhd":                     obj(fields{"uri": leaf()}),
		"writeAcceleratorEnabled": leaf(),
	}),
	"resourceDisk": from("2021-02-01", obj(fields{"size": leaf()})),
})

// encryptionShape can be as little as {"enabled":"false"} on a live VM.
var encryptionShape = obj(fields{
	"enabled": leaf(),
	"diskEncryptionKey": may(from("2021-11-01", obj(fields{
		"sourceVault": obj(fields{"id": leaf()}), "secretUrl": leaf(),
	}))),
	"keyEncryptionKey": may(from("2021-11-01", obj(fields{
		"sourceVault": obj(fields{"id": leaf()}), "keyUrl": leaf(),
	}))),
})

var networkShape = obj(fields{
	"interface": many(obj(fields{
		"ipv4": obj(fields{
			"ipAddress": many(obj(fields{"privateIpAddress": leaf(), "publicIpAddress": leaf()})),
			"subnet":    many(obj(fields{"address": leaf(), "prefix": leaf()})),
		}),
		"ipv6":       obj(fields{"ipAddress": many(obj(fields{"privateIpAddress": leaf()}))}),
		"macAddress": leaf(),
	})),
})

// extendedShape is what extended=true adds; hasCustomData is a truth value on
// the wire (docs/protocol-azure.md §1.3).
var extendedShape = obj(fields{
	"compute": obj(fields{"hasCustomData": {kind: flag}, "ppsType": leaf()}),
})

var identityShape = obj(fields{
	"tenantId":     must(leaf()),
	"system":       may(obj(fields{"clientId": must(leaf()), "objectId": must(leaf())})),
	"userAssigned": many(obj(fields{"clientId": must(leaf()), "objectId": must(leaf()), "resourceId": must(leaf())})),
	"resources":    may(many(leaf())),
})

// balancerShape has ports as numbers, unlike the instance (docs/protocol-azure.md §1.10).
var balancerShape = obj(fields{
	"publicIpAddresses": many(obj(fields{"frontendIpAddress": leaf(), "privateIpAddress": leaf()})),
	"inboundRules": many(obj(fields{
		"frontendIpAddress": leaf(), "protocol": leaf(), "frontendPort": {kind: number},
		"backendPort": {kind: number}, "privateIpAddress": leaf(),
	})),
	"outboundRules": many(obj(fields{"frontendIpAddress": leaf(), "privateIpAddress": leaf()})),
})
