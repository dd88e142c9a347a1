package main

import (
	"net/http"
	"slices"
	"strings"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

// The users whose requests are counted.
const (
	coordinator = "coordinator"
	agents      = "agents"
	collector   = "garbage collector"
	others      = "others"
)

var users = map[string]string{
	"system:serviceaccount:" + imps.SystemNamespace + ":imps-coordinator": coordinator,
	"system:serviceaccount:" + imps.SystemNamespace + ":imps-node":        agents,
	"system:serviceaccount:kube-system:generic-garbage-collector":         collector,
}

// leaseWrites is the one write that comes again and again.
const leaseWrites = coordinator + ": update leases"

// account is what the audit log holds about a phase.
type account struct {
	// SecretWrites are those of pull Secrets that succeeded, by user.
	SecretWrites map[string]int `json:"secretWrites"`
	// Conflicts and NotFound are those that failed with 409 and 404, Refused with any
	// other code.
	Conflicts int `json:"conflicts"`
	NotFound  int `json:"notFound"`
	Refused   int `json:"refused"`
	// OtherWrites are all other writes of imps, whatever became of them, by "user: what".
	OtherWrites map[string]int `json:"otherWrites"`
	// Requests are all, by user; a watch counts when it begins.
	Requests map[string]int `json:"requests"`
	// Reads are those of imps, by "user: what".
	Reads map[string]int `json:"reads"`
}

func newAccount() account {
	return account{SecretWrites: map[string]int{}, OtherWrites: map[string]int{}, Requests: map[string]int{}, Reads: map[string]int{}}
}

// add counts a request. Those of the bench itself do not count.
func (a *account) add(e cluster.Event) {
	counted := cluster.StageComplete
	if e.Verb == "watch" && e.Code < http.StatusBadRequest {
		counted = cluster.StageStarted // its end is no request
	}
	if e.User == "admin" || e.Stage != counted {
		return
	}
	user, known := users[e.User]
	if !known {
		user = others
	}
	a.Requests[user]++
	what := user + ": " + e.Verb + " " + strings.Join(slices.DeleteFunc([]string{e.Resource, e.Subresource}, isEmpty), "/")
	reads := e.Resource == "" || slices.Contains([]string{"get", "list", "watch"}, e.Verb) ||
		strings.HasSuffix(e.Resource, "reviews") // stored nowhere
	switch {
	case e.Group == "" && e.Resource == "secrets" && e.Name == imps.SecretName && !reads:
		switch {
		case e.Code < http.StatusBadRequest:
			a.SecretWrites[user]++
		case e.Code == http.StatusConflict:
			a.Conflicts++
		case e.Code == http.StatusNotFound:
			a.NotFound++
		default:
			a.Refused++
		}
	case user != coordinator && user != agents:
	case reads:
		a.Reads[what]++
	default:
		a.OtherWrites[what]++
	}
}

// impsWrites are all writes of imps but those of its Lease.
func (a *account) impsWrites() int {
	return sum(a.OtherWrites) - a.OtherWrites[leaseWrites] + a.SecretWrites[coordinator] + a.SecretWrites[agents]
}

func isEmpty(s string) bool { return s == "" }

func sum(counts map[string]int) (n int) {
	for _, count := range counts {
		n += count
	}
	return n
}

// accountSince counts what came after the mark.
func accountSince(control *cluster.Cluster, mark cluster.Mark) (account, error) {
	a := newAccount()
	events, err := control.Audit().Since(mark)
	for _, e := range events {
		a.add(e)
	}
	return a, err
}
