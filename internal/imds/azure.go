package imds

import (
	"slices"
	"strings"
)

// endpoint is one row of the table in protocol-azure §3.
type endpoint struct {
	path   string   // documented form; empty for endpoints that match more than one path
	read   Action   // what GET and HEAD stand for; empty when they are refused
	write  Action   // what POST stands for; empty when it is refused
	params []string // documented parameter names; nil: any name of the shape plainName
	covers []Action // see Query.Covers
}

// Parameter lists of more than one endpoint. A name that is not on its
// endpoint's list is refused: it may select something that policy has no word for.
var (
	versionOnly   = []string{"api-version"}
	versionFormat = []string{"api-version", "format"}
	selectors     = []string{"client_id", "object_id", "msi_res_id", "mi_res_id"}
	credential    = append([]string{"api-version", "cred-api-version", "bypass_cache", "cid", "uaid"}, selectors...)
	withUserdata  = []Action{InstanceUserdata}
)

// extendedParam turns a read of /metadata/instance into one of provisioning
// data, whatever its value (protocol-azure §4).
const extendedParam = "extended"

var azureEndpoints = []endpoint{
	// The bare root answers 400 with the list of newest versions: it is no
	// more than a reading of versions, so it is classified as one.
	{path: "/metadata", read: VersionsRead, params: versionFormat},
	{path: "/metadata/versions", read: VersionsRead, params: versionFormat},
	{path: "/metadata/instance", read: InstanceRead, covers: withUserdata,
		params: []string{"api-version", "format", extendedParam}},
	{path: "/metadata/instance/compute", read: InstanceRead, covers: withUserdata, params: versionFormat},
	{path: "/metadata/reprovisiondata", read: InstanceProvisioning, params: versionOnly},
	{path: "/metadata/attested/document", read: IdentityDocument, params: []string{"api-version", "format", "nonce"}},
	{path: "/metadata/identity/oauth2/token", read: IdentityToken,
		params: append([]string{"api-version", "resource", "authority", "bypass_cache", "claims"}, selectors...)},
	{path: "/metadata/identity/info", read: IdentityInfo, params: versionOnly},
	{path: "/metadata/identity/getplatformmetadata", read: IdentityCredential, params: credential},
	{path: "/metadata/identity/issuecredential", write: IdentityCredential, params: credential},
	{path: "/metadata/identity/credential", write: IdentityCredential, params: credential},
	{path: "/metadata/scheduledevents", read: EventsRead, write: EventsApprove, params: versionOnly},
	{path: "/metadata/loadbalancer", read: NetworkBalancer, params: versionFormat},
	{path: "/metadata/v1", read: LegacyRead},
}

var (
	legacyTree   = endpoint{read: LegacyRead}
	unknownTree  = endpoint{read: Unknown}
	instanceTree = endpoint{read: InstanceRead, params: versionFormat}
	userdataTree = endpoint{read: InstanceUserdata, params: versionFormat}
	extendedTree = endpoint{read: InstanceProvisioning, params: versionFormat}
)

// azureByPath finds an endpoint by its path in lower case.
var azureByPath = func() map[string]*endpoint {
	m := make(map[string]*endpoint, len(azureEndpoints))
	for i := range azureEndpoints {
		m[strings.ToLower(azureEndpoints[i].path)] = &azureEndpoints[i]
	}
	return m
}()

// Endpoint is a documented path of a service, for those who check that they
// have thought of all of it.
type Endpoint struct {
	Path    string
	Methods []string // GET, which HEAD goes with, and POST
	Params  []string // documented names; nil: any plain name
}

// Endpoints lists the endpoints of a cloud that have one path each; trees of
// paths, and what is not documented, are not among them. None for a cloud that
// is not served.
func Endpoints(c Cloud) []Endpoint {
	if c != Azure {
		return nil
	}
	list := make([]Endpoint, 0, len(azureEndpoints))
	for i := range azureEndpoints {
		e := &azureEndpoints[i]
		x := Endpoint{Path: e.path, Params: slices.Clone(e.params)}
		if e.read != "" {
			x.Methods = append(x.Methods, "GET")
		}
		if e.write != "" {
			x.Methods = append(x.Methods, "POST")
		}
		list = append(list, x)
	}
	return list
}

// action is what the method stands for here, or "" when it is refused.
func (e *endpoint) action(method string) Action {
	switch method {
	case "GET", "HEAD":
		return e.read
	case "POST":
		return e.write
	}
	return ""
}

// allow is the value of the Allow header of a 405.
func (e *endpoint) allow() string {
	switch {
	case e.write == "":
		return "GET, HEAD"
	case e.read == "":
		return "POST"
	}
	return "GET, HEAD, POST"
}

const (
	instancePrefix = "/metadata/instance/"
	legacyPrefix   = "/metadata/v1/"
	identityPrefix = "/metadata/identity"
)

// azureEndpoint finds the endpoint of a path that passed checkPath, and the
// path's canonical form. Every path has one: what is not in the table is
// unknownTree and keeps its letter case, since there is no documented one.
func azureEndpoint(path string) (*endpoint, string) {
	if len(path) > 1 && path[len(path)-1] == '/' {
		path = path[:len(path)-1]
	}
	var buf [64]byte
	if low, ok := lower(buf[:0], path); ok {
		if e := azureByPath[string(low)]; e != nil {
			return e, e.path
		}
	}
	switch {
	case hasPrefixFold(path, instancePrefix):
		return azureInstance(path)
	case hasPrefixFold(path, legacyPrefix):
		return &legacyTree, respell(path, legacyPrefix)
	}
	return &unknownTree, path
}

// azureInstance classifies a path below /metadata/instance. Documented keys get
// their documented letter case, because the service's own matching may ignore
// case (protocol-azure §4): /compute/USERDATA is user data.
func azureInstance(path string) (*endpoint, string) {
	var buf [160]byte
	out := append(buf[:0], instancePrefix[:len(instancePrefix)-1]...)
	e := &unknownTree
	depth, section := 0, ""
	for rest := path[len(instancePrefix):]; ; depth++ {
		seg, tail, more := strings.Cut(rest, "/")
		key, ok := instanceKey(seg)
		switch {
		case !ok:
			// No documented key holds such bytes; some parsers drop them.
			return &unknownTree, path
		case key == "userData" || key == "customData":
			e = &userdataTree
		case depth == 0:
			e, section = sectionOf(key), key
		case depth == 1 && section == "compute" && !isLetter(key[0]):
			e = &unknownTree // an index into an object could stand for any key
		}
		out = append(append(out, '/'), key...)
		if !more {
			break
		}
		rest = tail
	}
	if string(out) != path {
		path = string(out)
	}
	return e, path
}

// sectionOf is the endpoint of the sections below /metadata/instance.
func sectionOf(key string) *endpoint {
	switch key {
	case "compute", "network":
		return &instanceTree
	case "extended":
		return &extendedTree
	}
	return &unknownTree
}

// instanceKey is the documented spelling of a key of the instance document. A
// key that is not documented, such as a newer one or an array index, stays as
// it is. It reports false for what cannot be a key at all.
func instanceKey(seg string) (string, bool) {
	for i := range len(seg) {
		if !isLetter(seg[i]) && !isDigit(seg[i]) {
			return seg, false
		}
	}
	var buf [32]byte
	if low, ok := lower(buf[:0], seg); ok {
		if key, known := instanceKeys[string(low)]; known {
			return key, true
		}
	}
	return seg, seg != ""
}

// instanceKeys maps the keys of protocol-azure §4 in lower case to their
// documented spelling. Letter case never tells two of them apart.
var instanceKeys = func() map[string]string {
	m := make(map[string]string)
	for key := range strings.FieldsSeq(`
		compute network extended
		additionalCapabilities hibernationEnabled azEnvironment customData evictionPolicy extendedLocation name type
		host hostGroup id isHostCompatibilityLayerVm licenseType location offer osProfile adminUsername computerName
		disablePasswordAuthentication osType physicalZone placementGroupId plan product publisher platformFaultDomain
		platformSubFaultDomain platformUpdateDomain priority provider publicKeys keyData path resourceGroupName
		resourceId securityProfile encryptionAtHost secureBootEnabled securityType virtualTpmEnabled sku
		storageProfile dataDisks bytesPerSecondThrottle caching createOption diskCapacityBytes diskSizeGB image uri
		isSharedDisk isUltraDisk lun managedDisk storageAccountType opsPerSecondThrottle vhd writeAcceleratorEnabled
		imageReference communityGalleryImageId exactVersion sharedGalleryImageId version osDisk diffDiskSettings
		option encryptionSettings enabled diskEncryptionKey sourceVault secretUrl keyEncryptionKey keyUrl
		resourceDisk size subscriptionId tags tagsList value userData virtualMachineScaleSet vmId vmScaleSetName
		vmSize zone interface ipv4 ipv6 ipAddress privateIpAddress publicIpAddress subnet address prefix macAddress
		hasCustomData ppsType`) {
		m[strings.ToLower(key)] = key
	}
	return m
}()

// azureFamily is the error shape of a path, also of one that is refused for its
// spelling (protocol-azure §6).
func azureFamily(path string) Family {
	if !hasPrefixFold(path, identityPrefix) {
		return General
	}
	if rest := path[len(identityPrefix):]; rest != "" && (isLetter(rest[0]) || isDigit(rest[0])) {
		return General
	}
	return Identity
}
