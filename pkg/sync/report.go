package sync

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"k8s.io/apimachinery/pkg/types"
)

// ReportKey is the key of a node report's ConfigMap that holds its JSON.
const ReportKey = "report"

// reportMaxBytes bounds a report: a node has some hundred Pods.
const reportMaxBytes = 1 << 20

// Report is what an agent tells the coordinator about its node.
type Report struct {
	// Node is the name of the node.
	Node string `json:"node"`
	// FormatVersions are the versions of the rendered form that the agent reads.
	FormatVersions []int `json:"formatVersions"`
	// Demand are the namespaces that Pods of this node select, with the UIDs of the
	// resources whose Pod rules they match, sorted.
	Demand map[string][]types.UID `json:"demand,omitempty"`
	// Stuck are Pods of this node that wait in vain for an image which a resource with spec.target.rescue has credentials
	// for, and that do not name its Secret, sorted.
	Stuck []StuckPod `json:"stuck,omitempty"`
	// Kubelet is the state of the node cache; nil where there is none.
	Kubelet *KubeletReport `json:"kubelet,omitempty"`
}

// KubeletReport says what becomes of the credentials that kubelets are to be served.
type KubeletReport struct {
	// Problem is why the node cache does not hold what it should; empty where it does.
	Problem string `json:"problem,omitempty"`
}

// Encode returns the ConfigMap's data. The same report gives the same bytes.
func (r Report) Encode() (map[string]string, error) {
	for _, uids := range r.Demand {
		slices.Sort(uids)
	}
	slices.SortFunc(r.Stuck, StuckPod.compare)
	raw, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode node report: %w", err)
	}
	return map[string]string{ReportKey: string(raw)}, nil
}

// DecodeReport decodes a ConfigMap's data.
func DecodeReport(data map[string]string) (Report, error) {
	raw := data[ReportKey]
	if len(raw) > reportMaxBytes {
		return Report{}, fmt.Errorf("node report: %d bytes are more than %d", len(raw), reportMaxBytes)
	}
	var r Report
	if err := json.Unmarshal([]byte(raw), &r); err != nil {
		return Report{}, fmt.Errorf("node report: %w", err)
	}
	if r.Node == "" {
		return Report{}, errors.New("node report: it names no node")
	}
	return r, nil
}
