package main

import (
	"context"
	"fmt"
	"net/http"
	"slices"

	"k8s.io/apimachinery/pkg/watch"

	"github.com/imps-node/imps/test/cluster/cluster"
)

// actors are the users that write pull Secrets, as the audience knows them.
var actors = []struct{ name, user string }{
	{"agents", "system:serviceaccount:" + systemNamespace + ":imps-node"},
	{"coordinator", "system:serviceaccount:" + systemNamespace + ":imps-coordinator"},
	{"garbage collector", "system:serviceaccount:kube-system:generic-garbage-collector"},
}

// writes returns the requests for pull Secrets that were to write, of everyone but the demo itself.
func (d *demo) writes() ([]cluster.Event, error) {
	events, err := d.control.Audit().Since(d.mark)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(events, func(e cluster.Event) bool {
		reading := e.Verb == "get" || e.Verb == "list" || e.Verb == "watch"
		return e.Group != "" || e.Resource != "secrets" || e.Name != secretName || e.User == "admin" || reading
	}), nil
}

// creator returns who created the Secret of a namespace.
func (d *demo) creator(ctx context.Context, namespace string) (string, error) {
	by := ""
	return by, eventually(ctx, "the audit log has the creation in "+namespace, func(context.Context) error {
		events, err := d.writes()
		if err != nil {
			return err
		}
		for _, e := range events {
			if e.Namespace == namespace && e.Code == http.StatusCreated {
				by = actorOf(e)
				return nil
			}
		}
		return fmt.Errorf("%d writes", len(events))
	})
}

func actorOf(e cluster.Event) string {
	for _, actor := range actors {
		if actor.user == e.User {
			return actor.name
		}
	}
	return e.User
}

// account compares how often pull Secrets changed with how often imps wrote.
func (d *demo) account(context.Context) error {
	events, err := d.writes()
	if err != nil {
		return err
	}
	seen := map[watch.EventType]int{}
	for _, s := range d.watcher.all() {
		if s.secret.Namespace != occupied {
			seen[s.kind]++
		}
	}
	type cell struct {
		kind  watch.EventType
		actor string
	}
	requests := map[cell]int{}
	touched := 0
	for _, e := range events {
		requests[cell{kindOf(e), actorOf(e)}]++
		if e.Namespace == occupied {
			touched++
		}
	}
	d.say("   Requests to write pull Secrets in the API server's audit log:\n")
	t := table{printer: d.printer, widths: []int{18, -8, -8, -12, -18}}
	t.row("", "seen", actors[0].name, actors[1].name, actors[2].name)
	for _, kind := range []watch.EventType{watch.Added, watch.Modified, watch.Deleted, watch.Error} {
		cells := []any{map[watch.EventType]string{watch.Added: "created", watch.Modified: "changed", watch.Deleted: "deleted", watch.Error: "without effect"}[kind], seen[kind]}
		for _, actor := range actors {
			cells = append(cells, requests[cell{kind, actor.name}])
		}
		t.row(cells...)
	}
	fmt.Fprintln(d.out, requests, touched)
	for _, e := range events {
		fmt.Fprintln(d.out, e.Received.Format("05.000"), e.Written.Sub(e.Received), e.Verb, e.Code, e.Namespace, actorOf(e))
	}
	return nil
}

// kindOf returns what a request did to a Secret.
func kindOf(e cluster.Event) watch.EventType {
	switch {
	case e.Code == http.StatusCreated:
		return watch.Added
	case e.Code == http.StatusOK && e.Verb == "delete":
		return watch.Deleted
	case e.Code == http.StatusOK:
		return watch.Modified
	default:
		return watch.Error
	}
}
