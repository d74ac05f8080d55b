package sim

import "slices"

// allVersions are the api-versions of the service, oldest first
// (docs/protocol-azure.md §1.3).
var allVersions = []string{
	"2017-03-01", "2017-04-02", "2017-08-01", "2017-10-01", "2017-12-01",
	"2018-02-01", "2018-04-02", "2018-10-01",
	"2019-02-01", "2019-03-11", "2019-04-30", "2019-06-01", "2019-06-04", "2019-08-01", "2019-08-15", "2019-11-01",
	"2020-06-01", "2020-07-15", "2020-09-01", "2020-10-01", "2020-12-01",
	"2021-01-01", "2021-02-01", "2021-03-01", "2021-05-01", "2021-08-01", "2021-10-01", "2021-11-01", "2021-11-15", "2021-12-13",
	"2023-07-01", "2023-11-15", "2024-03-15", "2024-07-17", "2025-04-07",
}

// eventVersions are the api-versions of scheduled events, a list of their own,
// without the preview that asked for no header (docs/protocol-azure.md §1.3, §1.9).
var eventVersions = []string{
	"2017-08-01", "2017-11-01", "2019-01-01", "2019-04-01", "2019-08-01", "2020-07-01",
}

// newest returns the three newest of the versions, newest first, as version
// errors list them.
func newest(versions []string) []string {
	out := slices.Clone(versions[max(0, len(versions)-3):])
	slices.Reverse(out)
	return out
}

// since returns the versions that are not older than first; both are dates, so
// they compare as strings.
func since(versions []string, first string) []string {
	i, _ := slices.BinarySearch(versions, first)
	return versions[i:]
}
