package imds

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// ParseRecord reads a target back that Redacted wrote, as far as it goes: the
// query with the parameters that were shown, and the names of those that were
// there with their values hidden or cut. A record of a refused request may lack
// parameters that nobody had understood yet. It is an error when the target is
// none, when its path was cut, and when it is refused with this method.
func ParseRecord(method, target string) (q Query, hidden []string, err error) {
	path, query, _ := strings.Cut(target, "?")
	switch {
	case strings.HasSuffix(path, ellipsis):
		return q, nil, errors.New("the record's path was cut: what lay below is not known")
	case path == "" || path[0] != '/' || len(target) > maxTarget || !plainPath(path):
		return q, nil, fmt.Errorf("not the target of a request: %.256q", target)
	}
	q = Query{Cloud: Azure, Method: method, Family: azureFamily(path)}
	e, path := azureEndpoint(path)
	q.Path, q.Action, q.Covers = path, e.action(method), e.covers
	if q.Action == "" {
		return Query{}, nil, errors.New(faultMethod.text)
	}
	if q.Action == InstanceRead {
		q.Subtree = subtreeOf(path)
	}
	// Hidden values are read as empty, so that all names are checked together.
	marked := strings.Split(query, "&")
	plain := make([]string, len(marked))
	for i, pair := range marked {
		plain[i] = pair
		if name, value, _ := strings.Cut(pair, "="); strings.Contains(value, ellipsis) {
			plain[i] = name + "="
			hidden = append(hidden, name)
		}
	}
	params, why := parseQuery(strings.Join(plain, "&"), e.params)
	if why != nil {
		return Query{}, nil, errors.New(why.text)
	}
	named := 0
	for _, p := range params {
		if e.params != nil && p.Name == extendedParam {
			q.extend()
		}
		if q.Family == Identity && slices.Contains(selectors, p.Name) {
			named++
		}
	}
	for i, name := range hidden {
		hidden[i], _ = documented(name, e.params)
		params = slices.DeleteFunc(params, func(p Param) bool { return p.Name == hidden[i] })
	}
	if q.Params = params; named > 1 {
		return Query{}, nil, errors.New(faultSelectors.text)
	}
	if why := selectorFault(&q); why != nil {
		return Query{}, nil, errors.New(why.text)
	}
	return q, hidden, nil
}
