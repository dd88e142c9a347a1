package node

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	impsync "github.com/imps-node/imps/pkg/sync"
)

// dirty notes that the report may need a write.
func (a *Agent) dirty() {
	select {
	case a.reportDirty <- struct{}{}:
	default:
	}
}

// keepReport writes the report whenever it has changed, at most once per reportInterval.
// It starts after the first lists are in, so that it never withdraws demand it has only
// not seen yet. Requests run under work, which outlives ctx a little.
func (a *Agent) keepReport(ctx, work context.Context) error {
	backoff := reportInterval
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.reportDirty:
		}
		wrote, err := a.writeReport(work)
		switch {
		case err != nil:
			backoff = min(2*backoff, reportLongest)
			a.log.Warn("cannot write the node report", "error", impsync.Explain(err), "againIn", backoff.String())
			a.dirty()
		case !wrote:
			continue
		default:
			backoff = reportInterval
		}
		timer := time.NewTimer(backoff)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}

func (a *Agent) writeReport(ctx context.Context) (wrote bool, err error) {
	data, err := a.currentReport().Encode()
	if err != nil {
		return false, err
	}
	name := impsync.ReportName(a.config.NodeName)
	if there, ok := a.report.Get(types.NamespacedName{Namespace: a.config.Namespace, Name: name}); ok && there == data[impsync.ReportKey] {
		return false, nil
	}
	body, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": map[string]any{"name": name, "labels": map[string]string{impsync.LabelComponent: impsync.ComponentReport}},
		"data":     data,
	})
	if err != nil {
		return false, fmt.Errorf("encode node report: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	force := true
	_, err = a.core.ConfigMaps(a.config.Namespace).Patch(ctx, name, types.ApplyPatchType, body, metav1.PatchOptions{FieldManager: impsync.FieldManager, Force: &force})
	return true, err
}

// currentReport computes the report from the Pods and the rendered Secrets. A namespace is
// in demand when a Pod matches, whether or not a namespace rule selects it too: so nothing
// is lost in the moment in which such a rule ceases to.
func (a *Agent) currentReport() impsync.Report {
	a.mu.Lock()
	cacheProblem := a.cacheProblem
	var byPods, rescuing []*selecting
	for _, s := range a.active {
		if s.selection.HasPodRules() {
			byPods = append(byPods, s)
		}
		if s.Rescue {
			rescuing = append(rescuing, s)
		}
	}
	a.mu.Unlock()
	report := impsync.Report{
		Node:           a.config.NodeName,
		FormatVersions: a.config.FormatVersions,
		Demand:         map[string][]types.UID{},
	}
	if a.config.CacheDir != "" {
		report.Kubelet = a.cacheReport(cacheProblem)
	}
	// Of what this agent has never been able to read, the demand stays that was reported
	// last: by the agent before, which could.
	if unread := a.unread(); len(unread) > 0 {
		a.keepDemand(report.Demand, unread)
	}
	if len(byPods)+len(rescuing) == 0 {
		return report
	}
	type demand struct {
		namespace string
		uid       types.UID
	}
	seen := map[demand]struct{}{}
	a.pods.Range(func(key types.NamespacedName, p pod) bool {
		if a.config.Excluded.Matches(key.Namespace) {
			return true
		}
		for _, s := range byPods {
			d := demand{key.Namespace, s.Resource.UID}
			if _, ok := seen[d]; ok || !s.selection.MatchesPod(p.labels, p.annotations) {
				continue
			}
			seen[d] = struct{}{}
			report.Demand[d.namespace] = append(report.Demand[d.namespace], d.uid)
		}
		if slices.ContainsFunc(rescuing, func(s *selecting) bool { return s.wouldHelp(p) }) {
			report.Stuck = append(report.Stuck, impsync.StuckPod{Namespace: key.Namespace, Name: key.Name, UID: p.uid})
		}
		return true
	})
	return report
}

// cacheReport is the state of the node cache; before that is known, what was reported last: by the agent before.
func (a *Agent) cacheReport(problem *string) *impsync.KubeletReport {
	if problem != nil {
		return &impsync.KubeletReport{Problem: *problem}
	}
	if last, err := a.lastReport(); err == nil && last.Kubelet != nil {
		return last.Kubelet
	}
	return &impsync.KubeletReport{Problem: "the node cache is not written yet"}
}

// lastReport is the report that is there; an error where there is none, or none of ours.
func (a *Agent) lastReport() (impsync.Report, error) {
	text, _ := a.report.Get(types.NamespacedName{Namespace: a.config.Namespace, Name: impsync.ReportName(a.config.NodeName)})
	return impsync.DecodeReport(map[string]string{impsync.ReportKey: text})
}

// wouldHelp reports whether the Pod is stuck on a pull that the Secret has credentials for, and does not name it. Whoever names
// it is helped by the kubelet, which reads it at each try.
func (s *selecting) wouldHelp(p pod) bool {
	return !slices.Contains(p.pullSecrets, s.Target.Name()) && slices.ContainsFunc(p.refused, s.credentials.Serves)
}

// unread are the resources of whose rendered Secrets this agent has never been able to read anything.
func (a *Agent) unread() map[types.UID]bool {
	unread := map[types.UID]bool{}
	a.rendered.Range(func(key types.NamespacedName, r renderedSecret) bool {
		if !r.deleting && !r.foreign {
			unread[impsync.UIDOfRendered(key.Name)] = true
		}
		return true
	})
	a.mu.Lock()
	defer a.mu.Unlock()
	for name := range a.active {
		delete(unread, impsync.UIDOfRendered(name))
	}
	return unread
}

// keepDemand adds what the last report demands for these resources, as far as there still
// are Pods in its namespaces.
func (a *Agent) keepDemand(demand map[string][]types.UID, resources map[types.UID]bool) {
	last, err := a.lastReport()
	if err != nil {
		return
	}
	populated := map[string]bool{}
	a.pods.Range(func(key types.NamespacedName, _ pod) bool {
		populated[key.Namespace] = true
		return true
	})
	for namespace, uids := range last.Demand {
		if !populated[namespace] {
			continue
		}
		for _, uid := range uids {
			if resources[uid] {
				demand[namespace] = append(demand[namespace], uid)
			}
		}
	}
}
