package imds

import "strings"

// node is a key of the instance document.
type node struct {
	path     string // from the top, as Query.Subtree
	list     bool   // an array: indexes follow, and children are keys of its elements
	children map[string]*node
}

// child is nil for a key that is not documented, and below one.
func (n *node) child(key string) *node {
	if n == nil {
		return nil
	}
	return n.children[key]
}

// instanceDocument is what may be read as InstanceRead (protocol-azure §4): the
// documented keys of all versions, objects in braces, arrays in brackets. At the
// end of the network's lists stand the keys of version 2017-03-01.
var instanceDocument = parseDocument(`
compute{
	additionalCapabilities{hibernationEnabled} azEnvironment evictionPolicy extendedLocation{name type} host{id} hostGroup{id}
	isHostCompatibilityLayerVm licenseType location name offer osProfile{adminUsername computerName disablePasswordAuthentication}
	osType physicalZone placementGroupId plan{name product publisher} platformFaultDomain platformSubFaultDomain
	platformUpdateDomain priority provider publicKeys[keyData path] publisher resourceGroupName resourceId
	securityProfile{encryptionAtHost secureBootEnabled securityType virtualTpmEnabled} sku
	storageProfile{
		dataDisks[bytesPerSecondThrottle caching createOption diskCapacityBytes diskSizeGB image{uri} isSharedDisk isUltraDisk lun
			managedDisk{id storageAccountType} name opsPerSecondThrottle vhd{uri} writeAcceleratorEnabled]
		imageReference{communityGalleryImageId exactVersion id offer publisher sharedGalleryImageId sku version}
		osDisk{caching createOption diffDiskSettings{option} diskSizeGB
			encryptionSettings{enabled diskEncryptionKey{sourceVault{id} secretUrl} keyEncryptionKey{sourceVault{id} keyUrl}}
			image{uri} managedDisk{id storageAccountType} name osType vhd{uri} writeAcceleratorEnabled}
		resourceDisk{size}}
	subscriptionId tags tagsList[name value] version virtualMachineScaleSet{id} vmId vmScaleSetName vmSize zone}
network{
	interface[
		ipv4{ipAddress[privateIpAddress publicIpAddress ipAddress publicip] subnet[address prefix dnsservers[ipAddress]]}
		ipv6{ipAddress[privateIpAddress publicIpAddress ipAddress publicip]}
		macAddress mac]}`)

func parseDocument(s string) *node {
	root := &node{children: make(map[string]*node)}
	above, last := []*node{root}, root
	for s = strings.TrimSpace(s); s != ""; s = strings.TrimSpace(s) {
		parent := above[len(above)-1]
		switch s[0] {
		case '{', '[':
			last.list, last.children = s[0] == '[', make(map[string]*node)
			above, s = append(above, last), s[1:]
		case '}', ']':
			above, s = above[:len(above)-1], s[1:]
		default:
			key := s
			if end := strings.IndexAny(s, "{}[] \n\t"); end >= 0 {
				key = s[:end]
			}
			last = &node{path: join(parent.path, key)}
			parent.children[key], s = last, s[len(key):]
		}
	}
	return root
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "/" + key
}

// instanceKeys maps the documented keys below /metadata/instance in lower case
// to their documented spelling. Letter case never tells two of them apart.
var instanceKeys = func() map[string]string {
	m := make(map[string]string)
	for _, key := range []string{"extended", "hasCustomData", "ppsType", "userData", "customData"} {
		m[strings.ToLower(key)] = key
	}
	var add func(*node)
	add = func(n *node) {
		for key, c := range n.children {
			m[strings.ToLower(key)] = key
			add(c)
		}
	}
	add(instanceDocument)
	return m
}()

// azureInstance classifies a path below /metadata/instance. Documented keys get
// their documented letter case, because the service's own matching may ignore
// case (protocol-azure §4): /compute/USERDATA is user data.
func azureInstance(path string) (*endpoint, string) {
	var buf [160]byte
	out := append(buf[:0], instanceRoot...)
	var e *endpoint
	n, indexed := instanceDocument, false
	for rest, more := path[len(instancePrefix):], true; more; {
		var seg string
		seg, rest, more = strings.Cut(rest, "/")
		key, ok := instanceKey(seg)
		switch {
		case !ok:
			// No documented key holds such bytes; some parsers drop them.
			return &unknownTree, path
		case key == "userData" || key == "customData":
			e = &userdataTree
		case e == nil:
			e = sectionOf(key)
		case e == &instanceTree && isDigit(key[0]) && (indexed || n != nil && !n.list || !isIndex(key)):
			// An index into what is no array could stand for any key of it, and
			// another spelling of a number for any number.
			e = &unknownTree
		}
		if indexed = isDigit(key[0]); !indexed {
			n = n.child(key)
		}
		out = append(append(out, '/'), key...)
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

// isIndex reports whether a path segment is a number in the one form that every
// parser reads alike, and small enough for each.
func isIndex(seg string) bool {
	for i := range len(seg) {
		if !isDigit(seg[i]) {
			return false
		}
	}
	return seg != "" && len(seg) <= 4 && (seg[0] != '0' || seg == "0")
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

// subtreeOf is the Subtree of a canonical path of the action InstanceRead.
func subtreeOf(path string) string {
	rest := strings.TrimPrefix(path[len(instanceRoot):], "/")
	n, indexed := instanceDocument, false
	for tail, more := rest, rest != ""; more; {
		var seg string
		seg, tail, more = strings.Cut(tail, "/")
		if isDigit(seg[0]) {
			indexed = true
		} else {
			n = n.child(seg)
		}
	}
	switch {
	case !indexed:
		return rest
	case n != nil:
		return n.path
	}
	out := ""
	for seg := range strings.SplitSeq(rest, "/") {
		if !isDigit(seg[0]) {
			out = join(out, seg)
		}
	}
	return out
}
