package main

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"time"
)

// claims are those of a token of a ServiceAccount that matter here (pkg/serviceaccount/claims.go of Kubernetes).
type claims struct {
	Audience   audience `json:"aud"`
	Expires    int64    `json:"exp"` // seconds
	Subject    string   `json:"sub"`
	Kubernetes struct {
		Namespace      string `json:"namespace"`
		ServiceAccount struct {
			Name string `json:"name"`
		} `json:"serviceaccount"`
	} `json:"kubernetes.io"`
}

// audience is one name, or several (RFC 7519, 4.1.3).
type audience []string

func (a *audience) UnmarshalJSON(raw []byte) error {
	var one string
	if json.Unmarshal(raw, &one) == nil {
		*a = audience{one}
		return nil
	}
	return json.Unmarshal(raw, (*[]string)(a))
}

// namespaceOf returns the namespace of a Pod by the token of its ServiceAccount; false where anything about it is doubtful. Its
// signature is not looked at: who asks is the kubelet, which got it from the API server, and it opens nothing that is not
// already on this node.
func namespaceOf(token, wanted string, now time.Time) (string, bool) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return "", false
	}
	raw, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return "", false
	}
	var c claims
	if json.Unmarshal(raw, &c) != nil {
		return "", false
	}
	meant := false
	for _, a := range c.Audience {
		meant = meant || a == wanted
	}
	namespace, name := c.Kubernetes.Namespace, c.Kubernetes.ServiceAccount.Name
	if !meant || now.Unix() >= c.Expires || namespace == "" || name == "" || c.Subject != "system:serviceaccount:"+namespace+":"+name {
		return "", false
	}
	return namespace, true
}
